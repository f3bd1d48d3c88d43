"""Expert groups: whose statistics choose the set that whose sessions run on."""

from __future__ import annotations

import pytest
import torch

from griffin_core.engine import expert_group as sharing
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Finished, Started
from griffin_core.engine.snapshot import SessionSnapshot
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import Sharing
from tests.servers import eventually
from tests.unit.core.engines import Inbox, complete, finish, submit

PROMPTS = [tuple(range(n, 2 * n + 9, 1 + n % 3)) for n in (3, 20, 50, 90)]


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups choose again before the next step, however little changes."""
    monkeypatch.setattr(sharing, "STEPS_HELD", 0)
    monkeypatch.setattr(sharing, "SHARE_KEPT", 0.0)


def task(number: int, how: Sharing, max_tokens: int = 200, **pruning: object) -> GenerateTask:
    return GenerateTask(
        prompt=PROMPTS[number],
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        pruning=PruningParams(**{"density": 0.25, "sharing": how, **pruning}),
    )


def paused(running: Engine, each: GenerateTask) -> Inbox:
    """Submits a task and holds it after a few tokens, so that it stays."""
    _, inbox = submit(running, each)
    inbox.until(Started)
    inbox.open = False
    return inbox


def look(running: Engine, *turns: GenerateTask) -> list[SessionSnapshot]:
    """The sessions, once each has a view and nothing is being built."""
    seen: list[SessionSnapshot] = []

    def settled() -> bool:
        held = running.snapshot(contents=True).result(10)
        found = [held.session(each.turn_id) for each in turns]
        seen[:] = [s for s in found if s is not None and s.view is not None]
        return len(seen) == len(turns) and not held.groups.due

    eventually(settled)
    return seen


def chosen(session: SessionSnapshot) -> SlimSpec:
    assert session.runs_on is not None
    return session.runs_on


def by_formula(*sessions: SessionSnapshot) -> list[list[int]]:
    """Top-k of Σ s_i/√S_i, in float64 (arXiv 2404.01365, section 4.3)."""
    layers = []
    for layer in range(3):
        score = torch.zeros(88, dtype=torch.float64)
        for session in sessions:
            s2 = session.statistic[layer].double()
            score += s2.sqrt() / s2.sum().sqrt()
        layers.append(sorted(score.topk(22).indices.tolist()))
    return layers


def as_lists(experts: SlimSpec) -> list[list[int]]:
    return [layer.tolist() for layer in experts.layers]


@pytest.mark.usefixtures("restless")
def test_a_group_runs_on_the_topk_of_its_summed_statistics(running: Engine) -> None:
    tasks = [task(n, "shared") for n in range(4)]
    for each in tasks:
        paused(running, each)
    sessions = look(running, *tasks)
    assert all(s.view == sessions[0].view for s in sessions)
    assert as_lists(chosen(sessions[0])) == by_formula(*sessions)
    assert as_lists(chosen(sessions[0])) != as_lists(sessions[0].slim)
    for session in sessions:
        told = running.session(session.session_id).result(10).pruning.norm_mass
        assert told == pytest.approx(chosen(session).norm_mass(session.statistic))


@pytest.mark.usefixtures("restless")
def test_joining_and_leaving_choose_again(running: Engine) -> None:
    one, two, three = (task(n, "shared") for n in range(3))
    paused(running, one)
    (first,) = look(running, one)
    assert as_lists(chosen(first)) == as_lists(first.slim)
    paused(running, two)
    sessions = look(running, one, two)
    first = sessions[0]
    assert as_lists(chosen(first)) == by_formula(*sessions)
    paused(running, three)
    sessions = look(running, one, two, three)
    first = sessions[0]
    assert as_lists(chosen(first)) == by_formula(*sessions)
    running.cancel(two.turn_id)
    sessions = look(running, one, three)
    first = sessions[0]
    assert as_lists(chosen(first)) == by_formula(*sessions)
    running.cancel(three.turn_id)
    (first,) = look(running, one)
    assert as_lists(chosen(first)) == as_lists(first.slim)


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
        assert as_lists(chosen(session)) == as_lists(session.slim)


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
    held = running.snapshot().result(10)
    assert not held.groups.sessions and not held.groups.shared
    assert not any(view.users for view in held.views)


@pytest.mark.usefixtures("restless")
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
    eventually(lambda: len({each.view for each in look(running, first, other)}) == 1)
    sessions = look(running, first, other)
    assert sessions[0].view == sessions[1].view
    assert as_lists(chosen(sessions[0])) == by_formula(*sessions)


def test_private_sessions_among_all_kinds_make_what_each_makes_alone(running: Engine) -> None:
    """As they come and go, private ones run on copies, zeroed and on copies again."""

    def private() -> list[GenerateTask]:
        return [task(n % 4, "private", 20 + 15 * n, density=(0.5, 0.25)[n % 2]) for n in range(5)]

    alone = [complete(running, each)[0] for each in private()]
    others = [
        task(n % 4, how, 10 + 20 * n, density=density)
        for how, density in (("shared", 0.5), ("auto", 0.5), ("private", 1.0))
        for n in range(3)
    ]
    inboxes = [submit(running, each)[1] for each in (*private(), *others)]
    made = [finish(inbox) for inbox in inboxes]
    assert [tokens for tokens, _ in made[:5]] == alone
    for number, (tokens, last) in enumerate(made):
        assert isinstance(last, Finished)
        ran = last.pruning
        if number < 5:
            asked = (0.5, 0.25)[number % 2]
            mean = (1 + (len(tokens) - 1) * asked) / len(tokens)
            assert (ran.dense_tokens, ran.mean_density) == (1, pytest.approx(mean))
        else:
            assert 1 <= ran.dense_tokens <= len(tokens) and 0.5 <= ran.mean_density <= 1
