"""Checks: every so often a dense pass over a session's last tokens writes their KV again, adds them
to its statistics, and tells which of them the dense model would have drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from griffin_core.backends.torch_sampling import TorchSlots
from griffin_core.engine.dense_passes import CHECKED_TOKENS, MOST_SHARE, DensePasses
from griffin_core.engine.ports import Observer
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import InvalidRequest
from griffin_core.forward.prompt import Prompt
from griffin_core.hf import sparsify
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.calibration import Calibration
from tests.unit.core.engines import at_baseline, complete, engine, finish, submit

IDS = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(14))
MADE = 110


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check follows as soon as there are tokens for it."""
    monkeypatch.setattr(DensePasses, "interval", lambda *_: CHECKED_TOKENS)


def made(tokens: int = 20, **options: Any) -> GenerateTask:
    pruning = {"density": 0.5, "correction": "none", "checks": True, **options.pop("pruning", {})}
    return GenerateTask(
        **{
            "prompt": tuple(IDS[:tokens].tolist()),
            "pruning": PruningParams(**pruning),
            "stopping": StoppingParams(max_tokens=MADE, ignore_eos=True),
            **options,
        }
    )


def whole(directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


def in_pieces(
    model: PreTrainedModel, task: GenerateTask, bias: bool, calibration: Calibration | None
) -> list[int]:
    """Greedy tokens, where each piece of ``CHECKED_TOKENS`` runs on what all tokens before it
    choose, all of which have run dense."""
    ids = torch.tensor(task.prompt)
    ids = model.generate(ids[None], do_sample=False, max_new_tokens=1)[0]
    while (left := len(task.prompt) + MADE - len(ids)) > 0:
        own = ids[:-1]
        with sparsify(
            model,
            own,
            density=0.5,
            correction="bias" if bias else "none",
            calibration=calibration,
        ):
            count = min(left, CHECKED_TOKENS)
            ids = model.generate(ids[None], do_sample=False, max_new_tokens=count)[0]
    return ids[len(task.prompt) :].tolist()


def agreed(model: PreTrainedModel, task: GenerateTask, tokens: list[int]) -> tuple[int, int]:
    """How many tokens are checked, and how many of them the dense model chooses."""
    ids = torch.tensor([*task.prompt, *tokens])
    with torch.no_grad():
        best = model(ids[None]).logits[0].argmax(dim=1)
    begin = len(task.prompt)
    checked = (len(tokens) - 2) // CHECKED_TOKENS * CHECKED_TOKENS
    same = best[begin : begin + checked] == ids[begin + 1 : begin + 1 + checked]
    return checked, int(same.sum())


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma"])
def test_kv_and_experts_are_renewed_and_agreement_is_what_a_recount_gives(
    name: str,
    bias: bool,
    overlap: bool,
    tiny: Callable[[str], Model],
    tiny_directory: Callable[[str], Path],
) -> None:
    model = whole(tiny_directory(name))
    task = made(50 if bias else 20, pruning={"correction": "bias" if bias else "none"})
    with engine(tiny(name), overlap=overlap) as running:
        tokens, finished = complete(running, task)
        assert tokens == in_pieces(model, task, bias, tiny(name).decoder.calibration)
        figures = finished.pruning
        assert (figures.checked_tokens, figures.agreed_tokens) == agreed(model, task, tokens)
        assert figures.checked_tokens == 96
        assert at_baseline(running)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.0, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.4},
        {"temperature": 0.8, "seed": 5, "repetition_penalty": 1.3, "bad_words_ids": ((11, 12),)},
    ],
    ids=["plain", "penalized", "bad words"],
)
def test_sampled_tokens_agree_where_the_same_draw_gives_them(
    sampling: dict[str, Any], tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    params = SamplingParams(**sampling)
    task = made(sampling=params)
    with engine(tiny("llama"), local_prefill_max_tokens=None) as running:
        tokens, finished = complete(running, task)
        assert at_baseline(running)
        assert running.snapshot().result(30).slots_in_use == frozenset()
    ids = torch.tensor([*task.prompt, *tokens])
    with torch.no_grad():
        logits = whole(tiny_directory("llama"))(ids[None]).logits[0]
    slots, same = TorchSlots(1, torch.device("cpu")), 0
    for place in range(1, 97):
        slots.open(0, params, task.prompt)
        slots.count(0, tokens[:place], 1)
        slots.ban(0, [12] if params.bad_words_ids and tokens[place - 1] == 11 else [])
        position = len(task.prompt) + place
        draw = slots.sample(logits[position - 1][None], torch.tensor([0]), torch.tensor([position]))
        same += int(draw) == tokens[place]
    assert (finished.pruning.checked_tokens, finished.pruning.agreed_tokens) == (96, same)
    assert 0 < same < 96


def test_what_is_drawn_after_a_check_does_not_depend_on_what_the_check_drew(
    tiny: Callable[[str], Model],
) -> None:
    """With all neurons as experts a check changes nothing, and agrees; penalties count once."""
    params = SamplingParams(temperature=0.9, seed=6, frequency_penalty=0.7, presence_penalty=0.2)
    with engine(tiny("llama")) as running:
        plain = made(sampling=params, pruning={"density": 0.99, "checks": False})
        checked = made(sampling=params, pruning={"density": 0.99})
        expected, _ = complete(running, plain)
        tokens, finished = complete(running, checked)
        assert finished.pruning.checked_tokens == 96
        assert tokens[:33] == expected[:33]


def test_sessions_are_checked_beside_others_and_with_drafts(tiny: Callable[[str], Model]) -> None:
    few = SamplingParams(allowed_token_ids=frozenset({20, 21}))
    tasks = [
        made(
            10 + n,
            turn_id=f"turn {n}",
            sampling=few,
            speculation=SpeculationParams(mode="lookup" if n % 2 else "off"),
            pruning={"checks": bool(n % 3), "warmup_tokens": 5 * n},
        )
        for n in range(8)
    ]
    with engine(tiny("llama"), overlap=True) as running:
        alone = [
            complete(running, replace(task, turn_id="alone " + task.turn_id)) for task in tasks
        ]
        inboxes = [submit(running, task)[1] for task in tasks]
        for (tokens, _), inbox, task in zip(alone, inboxes, tasks, strict=True):
            together, finished = finish(inbox)
            assert (finished.pruning.checked_tokens > 0) == bool(task.pruning.checks)
            assert len(together) == len(tokens) == MADE
        assert at_baseline(running)


def test_a_residual_stays_with_the_experts_that_it_was_fitted_to(
    tiny: Callable[[str], Model],
) -> None:
    ids = torch.randint(0, 250, (140,), generator=torch.Generator().manual_seed(15)).tolist()
    task = made(prompt=tuple(ids), pruning={"correction": "residual", "correction_rank": 8})
    with engine(tiny("llama"), local_prefill_max_tokens=None) as running:
        _, finished = complete(running, task)
        assert finished.pruning.correction == "residual"
        assert finished.pruning.checked_tokens == 96


def test_dense_sessions_are_not_checked(tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama")) as running:
        _, dense = complete(running, made(pruning={"density": 1.0}))
        lossless = made(speculation=SpeculationParams(mode="slim"))
        _, drafted = complete(running, lossless)
        assert dense.pruning.checked_tokens == drafted.pruning.checked_tokens == 0


def test_observers_are_told(tiny: Callable[[str], Model]) -> None:
    class Counting(Observer):
        told: tuple[int, int] = (0, 0)

        def checked(self, tokens: int, agreed: int) -> None:
            self.told = self.told[0] + tokens, self.told[1] + agreed

    observer = Counting()
    with engine(tiny("llama"), observer=observer) as running:
        _, finished = complete(running, made())
        figures = finished.pruning
        assert observer.told == (figures.checked_tokens, figures.agreed_tokens)


def test_a_check_that_fails_ends_no_completion(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(tiny("llama")) as running:
        expected, _ = complete(running, made(pruning={"checks": False}))

        task = made()
        begun = Prompt.next_ids

        def fails_later(self: Prompt, tokens: int) -> torch.Tensor:
            if self.wants_hidden:
                raise MemoryError("no check")
            return begun(self, tokens)

        monkeypatch.setattr(Prompt, "next_ids", fails_later)
        tokens, finished = complete(running, task)
        assert tokens == expected and finished.pruning.checked_tokens == 0
        assert at_baseline(running)


def test_a_batch_invariant_engine_refuses(tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama"), batch_invariant=True) as running:
        for pruning in ({}, {"checks": None, "density": None, "agreement_floor": 0.5}):
            failed = submit(running, made(pruning=pruning))[1].until()
            assert isinstance(failed.error, InvalidRequest)
            assert "they come by time" in str(failed.error) or "checks come" in str(failed.error)


def test_a_session_that_goes_away_in_a_check_leaves_nothing(tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama")) as running:
        for tokens in range(30, 36):
            turn, inbox = submit(running, made())
            for _ in range(tokens):
                inbox.get()
            running.cancel(turn)
        assert at_baseline(running)


def test_a_score_has_none() -> None:
    with pytest.raises(InvalidRequest, match="false in a score"):
        ScoreTask(prompt=(1,), continuations=((2,),), pruning=PruningParams(checks=True))


def test_checks_take_their_share_of_the_time_and_no_more(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    found: list[int] = []
    interval = DensePasses.interval

    def noted(passes: DensePasses, compute_s: float) -> int:
        for _ in range(100):
            passes.note_step(0.01)
        found.append(interval(passes, 0.03))
        assert found[-1] == pytest.approx(0.03 / (MOST_SHARE * 0.01), abs=1)
        return CHECKED_TOKENS

    monkeypatch.setattr(DensePasses, "interval", noted)
    with engine(tiny("llama")) as running:
        complete(running, made())
    assert len(found) == 3
