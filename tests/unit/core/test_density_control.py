"""Density by measured agreement: the rungs that a session takes, and what it runs on there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from griffin_core.engine.dense_passes import CHECKED_TOKENS, DensePasses
from griffin_core.engine.density_control import FIRST_STAY, DensityControl
from griffin_core.engine.generation import Generation
from griffin_core.engine.session import Session
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import InvalidRequest
from griffin_core.hf import sparsify
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from tests.unit.core.engines import at_baseline, complete, engine, finish, submit
from tests.unit.core.test_checks import IDS, whole

MADE = 140


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check follows as soon as there are tokens for it."""
    monkeypatch.setattr(DensePasses, "interval", lambda *_: CHECKED_TOKENS)


def agreeing(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Lets each check find that a share of the tokens agrees."""

    def redraw(_: Generation, session: Session, sampler: Any, logits: torch.Tensor) -> list[int]:
        made = session.tokens[-len(logits) :]
        return [*made[: round(share * len(made))], *[-1] * (len(made) - round(share * len(made)))]

    monkeypatch.setattr(Generation, "redraw", redraw)


def made(tokens: int = 20, **options: Any) -> GenerateTask:
    pruning = {"correction": "none", "warmup_tokens": 0, "agreement_floor": 0.6}
    return GenerateTask(
        **{
            "prompt": tuple(IDS[:tokens].tolist()),
            "pruning": PruningParams(**{**pruning, **options.pop("pruning", {})}),
            "stopping": StoppingParams(max_tokens=MADE, ignore_eos=True),
            **options,
        }
    )


def test_the_rungs() -> None:
    control = DensityControl(0.6)
    assert (control.density, control.ceiling) == (0.75, 0.7)
    control.checked(0.65, 100)
    assert control.density == 0.75
    control.checked(0.8, 132)
    assert control.density == 0.5
    control.checked(1.0, 164)
    assert control.density == 0.5
    control.checked(0.5, 196)
    assert control.density == 0.75
    control.checked(0.5, 228)
    assert control.density == 1.0
    assert not control.tries(227 + FIRST_STAY) and control.tries(228 + FIRST_STAY)
    control.prune()
    assert control.density == 0.75 and not control.tries(10_000)
    control.checked(0.1, 400)
    assert not control.tries(399 + 2 * FIRST_STAY) and control.tries(400 + 2 * FIRST_STAY)
    assert DensityControl(0.95).ceiling == pytest.approx(0.975)


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_session_that_agrees_runs_on_fewer_neurons(
    name: str,
    overlap: bool,
    tiny: Callable[[str], Model],
    tiny_directory: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agreeing(monkeypatch, 1.0)
    model, task = whole(tiny_directory(name)), made()
    ids = torch.tensor(task.prompt)
    ids = model.generate(ids[None], do_sample=False, max_new_tokens=1)[0]
    for density in (0.75, 0.5, 0.5, 0.5, 0.5):
        if (left := len(task.prompt) + MADE - len(ids)) > 0:
            with sparsify(model, ids[:-1], density=density):
                count = min(left, CHECKED_TOKENS)
                ids = model.generate(ids[None], do_sample=False, max_new_tokens=count)[0]
    with engine(tiny(name), overlap=overlap) as running:
        tokens, finished = complete(running, task)
        assert tokens == ids[len(task.prompt) :].tolist()
        figures = finished.pruning
        assert figures.density == 0.5 and figures.agreement == 1 and figures.agreement_floor == 0.6
        mean = (1 + 32 * 0.75 + (MADE - 33) * 0.5) / MADE
        assert figures.mean_density == pytest.approx(mean, abs=0.01)
        assert at_baseline(running)


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_one_that_does_not_runs_dense_and_tries_again_after_a_while(
    overlap: bool, tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    agreeing(monkeypatch, 0.2)
    with engine(tiny("llama"), overlap=overlap) as running:
        _, finished = complete(running, made())
        figures = finished.pruning
        assert figures.checked_tokens == 64
        assert figures.density == 1
        # 32 slim ones, 64 dense ones, 32 slim ones again, and the rest dense.
        assert figures.dense_tokens == MADE - 64
        assert at_baseline(running)


def test_with_measured_agreement_many_sessions_end_well(tiny: Callable[[str], Model]) -> None:
    pruning = {"correction": "bias", "warmup_tokens": None}
    tasks = [made(10 + n, turn_id=f"turn {n}", pruning=pruning) for n in range(12)]
    with engine(tiny("llama"), overlap=True, sharing="auto", costs=None) as running:
        for inbox in [submit(running, task)[1] for task in tasks]:
            tokens, finished = finish(inbox)
            assert len(tokens) == MADE and finished.pruning.agreement_floor == 0.6
        assert at_baseline(running)


def test_an_engine_has_a_floor_for_requests_that_set_neither(tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama"), agreement_floor=0.4) as running:
        none = made(pruning={"agreement_floor": None}, keep=True)
        session_id, inbox = submit(running, none)
        _, finished = finish(inbox)
        assert finished.pruning.agreement_floor == 0.4
        stopping = StoppingParams(max_tokens=3)
        later = GenerateTask(prompt=(5,), continues=session_id, keep=True, stopping=stopping)
        assert complete(running, later)[1].pruning.agreement_floor == 0.4
        fixed = GenerateTask(
            prompt=(5,),
            continues=session_id,
            pruning=PruningParams(density=0.5),
            stopping=stopping,
        )
        assert complete(running, fixed)[1].pruning.agreement_floor is None


def test_a_residual_is_fitted_anew_on_each_rung(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    agreeing(monkeypatch, 1.0)
    ids = torch.randint(0, 250, (100,), generator=torch.Generator().manual_seed(15)).tolist()
    prompt = (*ids, *ids[:40])
    pruning = {"correction": "residual", "correction_rank": 8}
    stopping = StoppingParams(max_tokens=80, ignore_eos=True)
    task = made(prompt=prompt, pruning=pruning, stopping=stopping)
    with engine(tiny("llama"), local_prefill_max_tokens=None) as running:
        _, finished = complete(running, task)
        assert finished.pruning.correction == "residual" and finished.pruning.density == 0.5
        assert at_baseline(running)


@pytest.mark.parametrize("given", [0, 1, -0.1, 1.5, float("nan"), "0.5"])
def test_a_floor_out_of_range_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match="agreement_floor"):
        PruningParams(agreement_floor=given)


def test_a_density_beside_it_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="none beside an agreement_floor"):
        PruningParams(agreement_floor=0.5, density=0.5)
    with pytest.raises(InvalidRequest, match="none in a score"):
        ScoreTask(prompt=(1,), continuations=((2,),), pruning=PruningParams(agreement_floor=0.5))
