"""A kept session goes on from what its client has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from griffin_core.engine import memory
from griffin_core.engine.engine import Engine
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import FinishReason, StoppingParams
from tests.unit.core.engines import at_baseline, complete, engine, submit
from tests.unit.core.pieces import Pieces
from tests.unit.core.test_overlap import all_of

PROMPT = tuple(b"Q: Name a fruit.\nA:")
MORE = tuple(b"\nQ: Name a city.\nA:")
GREEDY_20 = StoppingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return Pieces([b"\nA:", b" red", b"d\n", "é".encode() + b"A"])


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Model], pieces: Pieces) -> Model:
    """Byte tokens and four others."""
    return replace(tiny("llama"), tokenizer=pieces.tokenizer, eos_ids=frozenset())


def held(running: Engine, session_id: str) -> list[int]:
    session = running.snapshot(contents=True).result(10).session(session_id)
    assert session is not None and session.tokens is not None
    return list(session.tokens)


def turn(prompt: tuple[int, ...], stopping: StoppingParams, **more: object) -> GenerateTask:
    pruning = more.pop("pruning", PruningParams(density=1.0))
    return GenerateTask(prompt=prompt, stopping=stopping, pruning=pruning, top_logprobs=3, **more)


@pytest.mark.parametrize("sharing", ["private", "shared"])
@pytest.mark.parametrize("include", [False, True])
def test_the_next_turn_is_that_of_a_call_with_the_visible_text(
    model: Model, include: bool, sharing: str
) -> None:
    """With a token for each byte, text and tokens are the same."""
    with engine(model, prefill_source=None, sharing=sharing) as running:
        few = SamplingParams(allowed_token_ids=frozenset(range(97, 123)))
        made, _ = complete(running, turn(PROMPT, GREEDY_20, sampling=few))
        text = bytes(made).decode()
        stop = text[8:11]
        visible = made[: text.find(stop) + 3 * include]
        stopping = replace(GREEDY_20, stop=(stop,), include_stop_string=include)
        first = turn(PROMPT, stopping, sampling=few, keep=True)
        _, finished = complete(running, first)
        assert (finished.reason, finished.stop) == (FinishReason.STOP_SEQUENCE, stop)
        assert finished.context_tokens == len(PROMPT) + len(visible)
        assert finished.prompt_tokens == len(PROMPT)
        assert finished.generated_tokens == text.find(stop) + 3
        assert held(running, first.turn_id) == [*PROMPT, *visible]
        _, kept = submit(running, turn(MORE, GREEDY_20, continues=first.turn_id))
        _, whole = submit(running, turn((*PROMPT, *visible, *MORE), GREEDY_20))
        (kept_made, kept_end), (whole_made, whole_end) = all_of(kept), all_of(whole)
        assert [token for token, _ in kept_made] == [token for token, _ in whole_made]
        for (_, ours), (_, theirs) in zip(kept_made, whole_made, strict=True):
            assert ours.chosen == pytest.approx(theirs.chosen, abs=1e-4)
        assert kept_end.context_tokens == whole_end.context_tokens
        assert at_baseline(running)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_a_token_in_which_the_text_ends_is_made_anew(
    model: Model, pieces: Pieces, seed: int, overlap: bool
) -> None:
    """Whatever tokens the text came in."""
    some = pieces.ids("\nA:", " red", "d\n", "é".encode() + b"A", "\n", "A", ":", "é".encode()[:1])
    few = SamplingParams(temperature=1.0, seed=seed, allowed_token_ids=frozenset(some))
    stopping = StoppingParams(max_tokens=60, stop=("\nA", "red", "éA:"), ignore_eos=True)
    with engine(model, prefill_source=None, overlap=overlap) as running:
        first = turn(PROMPT, stopping, sampling=few, keep=True)
        _, inbox = submit(running, first)
        events = [inbox.get()]
        while type(events[-1]).__name__ != "Finished":
            events.append(inbox.get())
        assert events[-1].reason is FinishReason.STOP_SEQUENCE
        text = "".join(event.text for event in events if hasattr(event, "text"))
        tokens = held(running, first.turn_id)
        assert tokens[: len(PROMPT)] == list(PROMPT)
        assert pieces.tokenizer.decode(tokens[len(PROMPT) :]) == text
        assert events[-1].context_tokens == len(tokens)
        after = complete(running, turn(MORE, GREEDY_20, continues=first.turn_id))[0]
        assert after == complete(running, turn((*tokens, *MORE), GREEDY_20))[0]
        assert at_baseline(running)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_turn_that_a_stop_string_ends_is_as_one_that_its_length_ends(
    model: Model, overlap: bool
) -> None:
    """On experts, too: statistic, cache and tokens are the same."""
    half = PruningParams(density=0.5, sharing="private")
    few = SamplingParams(allowed_token_ids=frozenset(range(97, 123)))
    with engine(model, prefill_source=None, overlap=overlap) as running:

        def two_turns(stopping: StoppingParams) -> list[int]:
            first = turn(PROMPT, stopping, sampling=few, pruning=half, keep=True)
            complete(running, first)
            return complete(running, turn(MORE, GREEDY_20, pruning=half, continues=first.turn_id))[
                0
            ]

        made, _ = complete(running, turn(PROMPT, GREEDY_20, sampling=few, pruning=half))
        text = bytes(made).decode()
        stop = text[8:11]
        visible = text.find(stop)
        assert visible > 0
        by_length = two_turns(replace(GREEDY_20, max_tokens=visible))
        assert two_turns(replace(GREEDY_20, stop=(stop,))) == by_length


def test_nothing_of_a_completion_is_held_if_nothing_was_seen(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        made, _ = complete(running, turn(PROMPT, GREEDY_20))
        stop = replace(GREEDY_20, stop=(model.tokenizer.decode(made[:1]),))
        first = turn(PROMPT, stop, keep=True)
        assert complete(running, first)[1].context_tokens == len(PROMPT)
        assert held(running, first.turn_id) == list(PROMPT)
        after = complete(running, turn(MORE, GREEDY_20, continues=first.turn_id))
        assert after[0] == complete(running, turn((*PROMPT, *MORE), GREEDY_20))[0]
        assert after[1].prompt_tokens == len(MORE)


def test_a_session_that_ends_by_length_holds_every_token(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        first = turn(PROMPT, GREEDY_20, keep=True)
        made, finished = complete(running, first)
        assert held(running, first.turn_id) == [*PROMPT, *made]
        assert finished.context_tokens == len(PROMPT) + 20


def test_a_prefill_server_s_session_is_cut_as_well(model: Model) -> None:
    with engine(model) as running:
        made, _ = complete(running, turn(PROMPT, GREEDY_20))
        text = model.tokenizer.decode(made[:4])
        stopping = replace(GREEDY_20, stop=(text[2],))
        first = turn(PROMPT, stopping, keep=True)
        _, inbox = submit(running, first)
        shown, _ = all_of(inbox)
        tokens = held(running, first.turn_id)
        drawn = [*PROMPT, *(token for token, _ in shown)]
        assert tokens == drawn[: len(tokens)] != drawn
        after = complete(running, turn(MORE, GREEDY_20, continues=first.turn_id))[0]
        assert after == complete(running, turn((*tokens, *MORE), GREEDY_20))[0]


def test_the_hosts_objects_of_a_kept_session_are_counted(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a session with few tokens they are much of what it holds."""
    monkeypatch.setattr(memory, "OBJECT_BYTES", 10_000)
    monkeypatch.setattr(memory, "TOKEN_BYTES", 7)
    with engine(model, prefill_source=None) as running:
        asked = GenerateTask(
            prompt=(1, 2, 3), stopping=StoppingParams(max_tokens=2, ignore_eos=True), keep=True
        )
        complete(running, asked)
        (info,) = running.sessions().result(10)
    spec = model.decoder.spec
    tensors = kv_bytes(spec, torch.float32, 4) + 12 * len(spec.layers) * spec.intermediate_size
    assert info.reserved_bytes == tensors + 10_000 + 7 * 4
