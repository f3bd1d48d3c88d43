"""Expert groups: whose statistics choose the set that whose sessions run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from griffin_core.decode.events import Finished, Started
from griffin_core.decode.session import Session, Sharing
from griffin_core.decode.task import GenerateTask, PruningParams
from griffin_core.engine import Engine
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.slim.crossover import (
    assumed_private_limit,
    measure_private_limit,
    private_limit_of,
)
from griffin_core.slim.packed import Packed
from tests.core.engines import Inbox, complete, engine, finish, submit
from tests.servers import eventually

PROMPTS = [tuple(range(n, 2 * n + 9, 1 + n % 3)) for n in (3, 20, 50, 90)]


@pytest.fixture
def model(tiny: Callable[[str], Model]) -> Model:
    return tiny("llama")


@pytest.fixture
def running(model: Model) -> Iterator[Engine]:
    with engine(model, own_prefill_tokens=None) as started:
        yield started


def task(number: int, sharing: Sharing, max_tokens: int = 200, **pruning: object) -> GenerateTask:
    return GenerateTask(
        prompt=PROMPTS[number],
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        pruning=PruningParams(**{"density": 0.25, "sharing": sharing, **pruning}),
    )


def paused(running: Engine, each: GenerateTask) -> Inbox:
    """Submits a task and holds it after a few tokens, so that it stays."""
    _, inbox = submit(running, each)
    inbox.until(Started)
    inbox.open = False
    return inbox


def look(running: Engine, *turns: GenerateTask) -> list[Session]:
    """The sessions, once each has a view and nothing is being built. For reading only."""
    decoding = running._decoding

    def settled() -> bool:
        running.sessions().result(10)
        found = [decoding.scheduler.find(each.turn_id) for each in turns]
        has_views = all(s is not None and s.view is not None for s in found)
        return has_views and not decoding._groups.choosing

    eventually(settled)
    return [decoding.scheduler.find(each.turn_id) for each in turns]


def chosen(session: Session) -> ExpertSet:
    assert session.view is not None
    return session.view.experts


def by_formula(*sessions: Session) -> list[list[int]]:
    """Top-k of Σ s_i/√S_i, in float64 (arXiv 2404.01365, section 4.3)."""
    layers = []
    for layer in range(3):
        score = torch.zeros(88, dtype=torch.float64)
        for session in sessions:
            s2 = session.s2[layer].double()
            score += s2.sqrt() / s2.sum().sqrt()
        layers.append(sorted(score.topk(22).indices.tolist()))
    return layers


def as_lists(experts: ExpertSet) -> list[list[int]]:
    return [layer.tolist() for layer in experts.layers]


def test_a_group_runs_on_the_topk_of_its_summed_statistics(running: Engine) -> None:
    tasks = [task(n, "shared") for n in range(4)]
    for each in tasks:
        paused(running, each)
    sessions = look(running, *tasks)
    assert all(s.view is sessions[0].view for s in sessions)
    assert as_lists(chosen(sessions[0])) == by_formula(*sessions)
    assert as_lists(chosen(sessions[0])) != as_lists(sessions[0].experts)
    for session in sessions:
        assert session.norm_mass == pytest.approx(chosen(session).norm_mass(session.s2))


def test_joining_and_leaving_choose_again(running: Engine) -> None:
    one, two, three = (task(n, "shared") for n in range(3))
    paused(running, one)
    (first,) = look(running, one)
    assert as_lists(chosen(first)) == as_lists(first.experts)
    paused(running, two)
    sessions = look(running, one, two)
    assert as_lists(chosen(first)) == by_formula(*sessions)
    paused(running, three)
    sessions = look(running, one, two, three)
    assert as_lists(chosen(first)) == by_formula(*sessions)
    running.cancel(two.turn_id)
    sessions = look(running, one, three)
    assert as_lists(chosen(first)) == by_formula(*sessions)
    running.cancel(three.turn_id)
    (first,) = look(running, one)
    assert as_lists(chosen(first)) == as_lists(first.experts)


def test_a_group_of_one_makes_what_private_makes(running: Engine) -> None:
    for policy in ("topk", "sampled", "topk_sampled", "random", "magnitude"):
        alone = complete(running, task(2, "private", 30, policy=policy))[0]
        assert complete(running, task(2, "shared", 30, policy=policy))[0] == alone


def test_other_densities_and_policies_are_other_groups(running: Engine) -> None:
    tasks = [
        task(0, "shared"),
        task(1, "shared", density=0.5),
        task(2, "shared", policy="random"),
    ]
    for each in tasks:
        paused(running, each)
    for session in look(running, *tasks):
        assert as_lists(chosen(session)) == as_lists(session.experts)


def test_private_sessions_are_never_changed_by_who_joins(running: Engine) -> None:
    alone = complete(running, task(1, "private", 100))[0]
    _, inbox = submit(running, task(1, "private", 100))
    inbox.until(Started)
    others = [submit(running, task(n % 4, "shared", 20 + n))[1] for n in range(8)]
    assert finish(inbox)[0] == alone
    for other in others:
        finish(other)


def test_sessions_that_come_and_go_in_a_group_all_finish_and_leave_nothing(
    running: Engine,
) -> None:
    inboxes = [submit(running, task(n % 4, "shared", 5 + 7 * n))[1] for n in range(20)]
    for n, inbox in enumerate(inboxes):
        tokens, last = finish(inbox)
        assert isinstance(last, Finished) and len(tokens) == 5 + 7 * n
    assert running.sessions().result(10) == []
    decoding = running._decoding
    assert not decoding._groups._groups and not decoding._groups._shared
    assert not decoding._groups._auto
    assert not any(view.users for view in decoding._views._views.values())


def test_auto_is_private_up_to_the_limit_and_shared_beyond(model: Model) -> None:
    with engine(model, own_prefill_tokens=None, private_limit=lambda density: 2) as running:
        tasks = [task(n, "auto") for n in range(4)]
        for each in tasks[:2]:
            paused(running, each)
        for session in look(running, *tasks[:2]):
            assert as_lists(chosen(session)) == as_lists(session.experts)
        paused(running, tasks[2])
        sessions = look(running, *tasks[:3])
        assert as_lists(chosen(sessions[0])) == by_formula(*sessions)
        assert all(s.view is sessions[0].view for s in sessions)
        paused(running, tasks[3])
        assert len({id(s.view) for s in look(running, *tasks)}) == 1


def test_auto_leaves_private_sessions_alone(model: Model) -> None:
    with engine(model, own_prefill_tokens=None, private_limit=lambda density: 1) as running:
        private, *autos = task(0, "private"), task(1, "auto"), task(2, "auto")
        for each in (private, *autos):
            paused(running, each)
        first, *others = look(running, private, *autos)
        assert as_lists(chosen(first)) == as_lists(first.experts)
        assert as_lists(chosen(others[0])) == by_formula(*others)


def test_a_later_turn_keeps_its_sharing_and_joins_again(running: Engine) -> None:
    first = GenerateTask(
        prompt=PROMPTS[0],
        stopping=StoppingParams(max_tokens=2, ignore_eos=True),
        pruning=PruningParams(density=0.25, sharing="shared"),
        keep=True,
    )
    complete(running, first)
    other = task(1, "shared")
    paused(running, other)
    later = GenerateTask(
        prompt=(5, 6),
        stopping=StoppingParams(max_tokens=100, ignore_eos=True),
        continues=first.turn_id,
    )
    _, inbox = submit(running, later)
    inbox.until(Started)
    inbox.open = False
    eventually(lambda: running._decoding.scheduler.find(first.turn_id).view is not None)
    sessions = [running._decoding.scheduler.find(each.turn_id) for each in (first, other)]
    eventually(lambda: sessions[0].view is sessions[1].view)
    assert as_lists(chosen(sessions[0])) == by_formula(*sessions)


def test_private_sets_pay_as_long_as_they_take_no_longer_than_dense() -> None:
    limit = private_limit_of(
        dense={1: 10.0, 2: 12.0, 4: 14.0},
        half={1: 6.0, 2: 11.0, 4: 20.0},
        whole={1: 10.0, 2: 19.0, 4: 36.0},
    )
    assert [limit(density) for density in (0.25, 0.5, 0.75, 1.0)] == [4, 2, 1, 1]
    noisy = {1: 6.0, 2: 13.0, 4: 13.9}  # four seem to pay, and two do not
    assert private_limit_of({1: 10.0, 2: 12.0, 4: 14.0}, noisy, noisy)(0.5) == 1


def test_the_crossover_is_measured(model: Model) -> None:
    limit = measure_private_limit(model.decoder, Packed())
    assert all(1 <= limit(density) <= 16 for density in (0.01, 0.25, 0.5, 1.0))
    assert limit(0.05) >= limit(1.0)


def test_by_bytes_alone_two_halves_are_a_whole() -> None:
    assert [assumed_private_limit(d) for d in (1.0, 0.75, 0.5, 0.25)] == [1, 1, 2, 4]
