"""One step for all sessions: what each makes does not depend on who else is there."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import ref

import pytest
import torch

from griffin_core.backends.base import RunFF
from griffin_core.backends.batch import StepSequence
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Failed, Finished, Scored, Started, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.ports import Observer
from griffin_core.engine.prefill_queue import PrefillQueue
from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import InvalidRequest
from griffin_core.experts.policies import POLICIES
from griffin_core.experts.selection import Selection
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.forward.events import (
    LayerExperts,
)
from griffin_core.forward.invariant import InvariantStep
from griffin_core.forward.prefill import launch, prefill
from griffin_core.forward.prompt import (
    Part,
    Prompt,
)
from griffin_core.forward.prompt_pass import Pass, Tell
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.model.hub import DEFAULT_MODEL
from griffin_core.model.load import Model, load_model
from griffin_core.sampling.logprobs import Logprobs
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.masked import Masked
from griffin_core.slim.packed import Packed
from griffin_core.slim.views import WholeView
from griffin_core.slim.zeroed import RowMasks, ZeroedLayers
from tests.calibrations import calibrate
from tests.servers import eventually
from tests.tiny import MODELS
from tests.unit.core.engines import Inbox, at_baseline, complete, engine, finish, submit


def random_task(number: int) -> GenerateTask:
    """Some prompt, length, density, policy, seed and sampling, the same for the same number."""
    draw = random.Random(number)
    return GenerateTask(
        prompt=tuple(draw.randrange(256) for _ in range(draw.choice((1, 3, 20, 60)))),
        sampling=SamplingParams(
            temperature=draw.choice((0.0, 0.8)),
            top_p=draw.choice((1.0, 0.9)),
            repetition_penalty=draw.choice((1.0, 1.2)),
            seed=number,
        ),
        stopping=StoppingParams(max_tokens=draw.randrange(1, 40), ignore_eos=True),
        pruning=PruningParams(
            density=draw.choice((1.0, 0.5, 0.25, 0.01)),
            policy=draw.choice(POLICIES),
            correction=draw.choice(("none", "bias")),
        ),
    )


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_32_sessions_that_come_and_go_make_what_each_makes_alone(
    name: str, overlap: bool, tiny: Callable[[str], Model]
) -> None:
    tasks = [random_task(number) for number in range(32)]
    with engine(tiny(name), prefill_source=None) as running:
        alone = [complete(running, each)[0] for each in tasks]
    draw = random.Random(0)
    with engine(
        tiny(name),
        prefill_source=None,
        limits=Limits(max_sessions=24, chunk_tokens=16),
        overlap=overlap,
    ) as running:
        inboxes = []
        for number, each in enumerate(tasks):
            again = random_task(number)  # a turn of its own
            assert again.prompt == each.prompt
            inboxes.append(submit(running, again)[1])
            time.sleep(draw.choice((0.0, 0.0, 0.002, 0.01)))
        assert [finish(inbox)[0] for inbox in inboxes] == alone


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_step_of_several_sessions_is_several_steps_of_one(
    name: str, tiny: Callable[[str], Model]
) -> None:
    """Ragged lengths, several tokens at once, dense, zeroed and slim views, in every family."""
    decoder = tiny(name).decoder
    pool = decoder.new_pool(12 * 64)

    def session(number: int) -> tuple[KvCache, Sequence[RunFF]]:
        cache = pool.allocate(64)
        ids = [(7 * number + i) % 256 for i in range(1 + 9 * number)]
        selection = Selection(density=(1.0, 0.5, 0.25)[number % 3])
        events = prefill(decoder, ids, selection, cache=cache)
        experts = [event.experts for event in events if isinstance(event, LayerExperts)]
        if selection.density < 1 and number > 2:
            every = SlimSpec.of_layers(decoder.spec.intermediate_size, torch.stack(experts))
            return cache, ZeroedLayers(decoder, every)
        layers = zip(decoder.layers, experts, strict=True)
        return cache, [Packed().build(layer, kept, "gemm") for layer, kept in layers]

    def steps(sessions: list[tuple[KvCache, Sequence[RunFF]]]) -> list[StepTokens]:
        return [
            StepTokens(cache=cache, view=view, token_ids=range(5, 6 + number))
            for number, (cache, view) in enumerate(sessions)
        ]

    together = decode_tokens(decoder, steps([session(number) for number in range(6)]))
    alone = [
        decode_tokens(decoder, [step])[0]
        for step in steps([session(number) for number in range(6)])
    ]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@torch.inference_mode()
def test_a_session_makes_the_same_while_its_form_and_its_neighbours_change(
    name: str, tiny: Callable[[str], Model]
) -> None:
    """Copies, zeroed with others, zeroed alone, masked: log-probabilities within 1e-5."""
    decoder = tiny(name).decoder
    table, pool = BlockTable(decoder), decoder.new_pool(4 * 32)
    width = decoder.spec.intermediate_size

    def random_set(seed: int) -> SlimSpec:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand((len(decoder.layers), width), generator=generator).topk(width // 2)
        return SlimSpec.of_layers(width, chosen.indices.sort(dim=1).values.int())

    def of(form: Packed | Masked, experts: SlimSpec) -> list[RunFF]:
        pairs = zip(decoder.layers, experts.layers, strict=True)
        return [form.build(layer, own, "gemv") for layer, own in pairs]

    mine, zeroed = of(Packed(), random_set(0)), ZeroedLayers(decoder, random_set(0))
    dense = [layer.ff for layer in decoder.layers]
    others = [ZeroedLayers(decoder, random_set(seed)) for seed in (1, 2)]
    shared = of(Packed(), random_set(3))
    batches: list[list[Sequence[RunFF]]] = [
        [mine],
        [zeroed],
        [zeroed, *others],
        [others[1], zeroed, others[0]],
        [dense, zeroed, shared, shared],
        [zeroed, dense, others[0], shared],
        [mine, dense, *others],
        [zeroed, *others],
    ]
    caches = [pool.allocate(32) for _ in range(4)]
    alone = decoder.new_cache(32)
    for token, batch in enumerate(batches, start=40):
        place = next(i for i, view in enumerate(batch) if view in (mine, zeroed))
        own, *rest = caches
        used = [*rest[:place], own, *rest[place : len(batch) - 1]]
        for cache in rest:
            cache.length = own.length  # of whatever: they only take part
        steps = [
            StepTokens(cache=cache, view=view, token_ids=[token])
            for cache, view in zip(used, batch, strict=True)
        ]
        got = decode_tokens(decoder, steps, table)[place].log_softmax(dim=1)
        masked = StepTokens(cache=alone, view=of(Masked(), random_set(0)), token_ids=[token])
        exact = decode_tokens(decoder, [masked])[0].log_softmax(dim=1)
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_masks_are_made_once_for_the_same_sessions(model: Model) -> None:
    masks, dtype = RowMasks(), torch.float32
    experts = SlimSpec.of_layers(88, torch.tensor([[3], [5], [87]], dtype=torch.int32))
    one, other = ZeroedLayers(model.decoder, experts), ZeroedLayers(model.decoder, experts)
    first = masks.of([one, other], dtype)
    assert [layer.sum().item() for layer in first] == [2, 2, 2]
    assert masks.of([one, other], dtype) is first
    assert masks.of([other, one], dtype) is not first


@torch.inference_mode()
def test_masks_go_with_the_first_session_that_ends(model: Model) -> None:
    masks = RowMasks()
    experts = SlimSpec.of_layers(88, torch.tensor([[3], [5], [87]], dtype=torch.int32))
    for ends in (0, 1):
        sessions = [ZeroedLayers(model.decoder, experts) for _ in range(2)]
        mask = ref(masks.of(sessions, torch.float32)[0])
        assert mask() is not None
        del sessions[ends]
        assert mask() is None
        assert [layer.sum() for layer in masks.of(sessions, torch.float32)] == [1, 1, 1]


def test_an_engine_without_sessions_holds_no_masks(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[RowMasks] = []
    of = RowMasks.of

    def noted(masks: RowMasks, *arguments: Any) -> Any:
        made.append(masks)
        return of(masks, *arguments)

    monkeypatch.setattr(RowMasks, "of", noted)
    with engine(model, prefill_source=None, batch_invariant=True) as running:
        for sessions in (2, 9):  # in one part of a step, and in two
            tasks = [random_task(number) for number in range(sessions)]
            half = PruningParams(density=0.5)
            boxes = [submit(running, replace(each, pruning=half))[1] for each in tasks]
            assert all(isinstance(finish(box)[1], Finished) for box in boxes)
            eventually(lambda: at_baseline(running))
            assert made and all(masks.empty for masks in made)


@torch.inference_mode()
def test_sessions_with_one_view_share_its_products(model: Model) -> None:
    """In whatever order they stand."""
    decoder = model.decoder
    rows: list[int] = []

    def view() -> list[RunFF]:
        def block(x: torch.Tensor, norm: object = None, residual: object = None) -> torch.Tensor:
            rows.append(x.shape[0])
            return x

        return [block for _ in decoder.layers]

    one, other = view(), view()
    pool = decoder.new_pool(5 * 4)
    steps = [
        StepTokens(cache=pool.allocate(4), view=each, token_ids=[3])
        for each in (one, other, one, other, one)
    ]
    decode_tokens(decoder, steps)
    assert rows == [3, 2] * len(decoder.layers)


def test_scoring_runs_beside_generation(model: Model) -> None:
    generate = random_task(3)
    score = ScoreTask(prompt=(1, 2, 3), continuations=(tuple(range(40, 140)),))
    with engine(model, prefill_source=None) as running:
        alone = (
            complete(running, random_task(3))[0],
            complete(running, score)[1].continuations[0].logprobs,
        )
    with engine(model, prefill_source=None) as running:
        again = ScoreTask(prompt=(1, 2, 3), continuations=(tuple(range(40, 140)),))
        inboxes = [submit(running, each)[1] for each in (generate, again, score)]
        tokens, first, second = (finish(inbox) for inbox in inboxes)
    assert tokens[0] == alone[0]
    assert first[1].continuations[0].logprobs == pytest.approx(alone[1], abs=1e-5)
    assert second[1].continuations[0].logprobs == pytest.approx(alone[1], abs=1e-5)


# -- prefills between steps ------------------------------------------------------------------------


def chunks_and_steps(model: Model, monkeypatch: pytest.MonkeyPatch, share: float) -> list[str]:
    """What the model runs, in order, while a long prompt arrives beside a stream."""
    log: list[str] = []
    embed = Decoder.embed

    def noted(self: Decoder, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        log.append("chunk" if len(ids) == 8 else "step")
        return embed(self, ids, positions)

    monkeypatch.setattr(Decoder, "embed", noted)
    stopping = StoppingParams(max_tokens=250, ignore_eos=True)
    stream = GenerateTask(prompt=(1, 2, 3), stopping=stopping)
    long = GenerateTask(prompt=tuple(range(160)), stopping=StoppingParams(max_tokens=1))
    limits = Limits(chunk_tokens=8, prefill_share=share)
    with engine(model, prefill_source=None, limits=limits) as running:
        _, inbox = submit(running, stream)
        inbox.until(TokensMade)
        finish(submit(running, long)[1])
        running.cancel(stream.turn_id)
    assert log.count("chunk") == 20
    first = log.index("chunk")
    last = len(log) - log[::-1].index("chunk")
    return log[first:last]


def test_a_long_prompt_stalls_streams_for_no_more_than_a_chunk(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = chunks_and_steps(model, monkeypatch, share=1.0)
    assert log == ["chunk", "step"] * 19 + ["chunk"]


def test_the_smaller_the_share_the_more_steps_between_chunks(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = chunks_and_steps(model, monkeypatch, share=0.9)
    monkeypatch.undo()
    small = chunks_and_steps(model, monkeypatch, share=0.2)
    assert small.count("step") > 1.5 * large.count("step")


def test_what_streams_hold_back_is_shown_before_a_chunk_of_a_prompt(model: Model) -> None:
    with engine(model, prefill_source=None, stream_interval=1000) as running:
        stopping = StoppingParams(max_tokens=240, ignore_eos=True)
        stream, inbox = submit(running, GenerateTask(prompt=(1, 2, 3), stopping=stopping))
        assert len(inbox.until(TokensMade).ids) == 1
        eventually(lambda: running.session(stream).result(10).generated_tokens > 5)
        finish(submit(running, GenerateTask(prompt=tuple(range(100))))[1])
        assert 5 <= len(inbox.until(TokensMade).ids) < 239


# -- slow readers ----------------------------------------------------------------------------------


def test_a_reader_that_stops_is_ended_after_the_stated_time(model: Model) -> None:
    limits = Limits(reader_timeout_s=0.2)
    with engine(model, prefill_source=None, limits=limits) as running:
        stream = GenerateTask(prompt=(1,), stopping=StoppingParams(max_tokens=200, ignore_eos=True))
        inbox = Inbox()
        running.submit(stream, inbox)
        inbox.until(Started)
        inbox.open = False
        clock = time.monotonic()
        failed = inbox.until(Finished)
        assert type(failed.error).__name__ == "ReaderTooSlow"
        assert "0.2 s" in str(failed.error)
        assert 0.2 <= time.monotonic() - clock < 5
        assert running.sessions().result(10) == []
        assert running.held_bytes == 0


# -- batch-invariant -------------------------------------------------------------------------------


@pytest.fixture
def bfloat16(tiny_directory: Callable[[str], Path]) -> Callable[[str], Model]:
    """Name of ``tests.tiny.MODELS`` -> the model in bfloat16."""

    def load(name: str) -> Model:
        model = load_model(str(tiny_directory(name)), dtype=torch.bfloat16)
        calibrate(model.decoder)
        return model

    return load


def probe(number: int) -> GenerateTask | ScoreTask:
    """One of those whose results are compared: greedy and sampled, dense and on experts, with
    prompts of less and of more than one chunk; and a score."""
    if number == SCORE:
        return ScoreTask(
            prompt=tuple(range(21)),
            continuations=(tuple(range(90, 130)),),
            pruning=PruningParams(density=0.5),
        )
    return GenerateTask(
        prompt=tuple((11 * number + 3 * i) % 256 for i in range((2, 50, 7, 33)[number])),
        sampling=SamplingParams(
            temperature=(0.0, 0.0, 0.9, 1.1)[number],
            top_p=(1.0, 1.0, 1.0, 0.95)[number],
            presence_penalty=(0.0, 0.0, 0.0, 0.3)[number],
            seed=number,
        ),
        stopping=StoppingParams(max_tokens=16, ignore_eos=True),
        pruning=PruningParams(density=(1.0, 0.5, 1.0, 0.25)[number]),
        top_logprobs=2,
        keep=True,
    )


SCORE = 4
PROBES = range(SCORE + 1)


def next_turn(first: GenerateTask) -> GenerateTask:
    """A kept probe's next turn."""
    return replace(first, prompt=(9, 8, 7) * 8, continues=first.turn_id, turn_id=uuid4().hex)


def other(number: int) -> GenerateTask | ScoreTask:
    """A neighbour: of any length, density and sharing; some score."""
    task = random_task(number)
    if number % 5 == 4:
        return ScoreTask(prompt=task.prompt, continuations=(task.prompt * 2,), pruning=task.pruning)
    sharing = ("private", "shared", "auto")[number % 3]
    return replace(task, pruning=replace(task.pruning, sharing=sharing))


Made = tuple[list[int], list[Any]]


def made(inbox: Inbox) -> Made:
    """All tokens and their log-probabilities."""
    tokens: list[int] = []
    logprobs: list[Any] = []
    while isinstance(event := inbox.until(TokensMade, Finished, Scored), TokensMade):
        tokens += event.ids
        logprobs += event.logprobs
    assert isinstance(event, Finished | Scored), event
    return tokens, [*event.continuations[0].logprobs] if isinstance(event, Scored) else logprobs


def chosen(logprobs: Any) -> float:
    """Of what a probe made, that of the token itself."""
    return logprobs.chosen if isinstance(logprobs, Logprobs) else logprobs


def made_alone(model: Model, **options: Any) -> list[Made]:
    """What the probes make, and then their next turns, one after the other."""
    limits, probes = Limits(chunk_tokens=16), [probe(number) for number in PROBES]
    with engine(model, prefill_source=None, limits=limits, **options) as running:
        turns = [*probes, *(next_turn(each) for each in probes[:SCORE])]
        return [made(submit(running, each)[1]) for each in turns]


def made_beside(model: Model, others: int, **options: Any) -> list[Made]:
    """The same while they all and others come, run and go."""
    limits = Limits(max_sessions=16, chunk_tokens=16)
    draw = random.Random(others)
    probes = [probe(number) for number in PROBES]
    arrivals = [*probes, *(other(100 + number) for number in range(others))]
    draw.shuffle(arrivals)
    inboxes = {}
    with engine(model, prefill_source=None, limits=limits, **options) as running:
        for task in arrivals:
            inboxes[task.turn_id] = submit(running, task)[1]
            time.sleep(draw.choice((0.0, 0.002, 0.01)))
        found = [made(inboxes.pop(each.turn_id)) for each in probes]
        later = [submit(running, next_turn(each))[1] for each in probes[:SCORE]]
        found += [made(inbox) for inbox in later]
        for inbox in inboxes.values():
            assert not isinstance(finish(inbox)[1], Failed)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_batch_invariant_private_sessions_make_the_same_to_the_bit_whoever_is_there(
    name: str, bfloat16: Callable[[str], Model]
) -> None:
    """In bfloat16, where one row and several have other kernels, and on two threads, among which
    sums are divided; with all log-probabilities."""
    model = bfloat16(name)
    alone = made_alone(model, batch_invariant=True, threads=2)
    for others in (1, 5, 11):
        assert made_beside(model, others, batch_invariant=True, threads=2) == alone, others


def test_in_float32_the_tokens_are_the_same_without_it_and_the_bits_with_it(model: Model) -> None:
    alone = made_alone(model)
    invariant = made_alone(model, batch_invariant=True)
    assert made_beside(model, 11, batch_invariant=True) == invariant
    for found in (made_beside(model, 11), invariant):
        for (tokens, logprobs), (own, own_logprobs) in zip(found, alone, strict=True):
            assert tokens == own
            assert [chosen(each) for each in logprobs] == pytest.approx(
                [chosen(each) for each in own_logprobs], abs=1e-4
            )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_batch_invariant_holds_for_smollm2_beside_3_to_15_others() -> None:
    """Requests whose texts differed from the first tokens on, and log-probabilities by up to 0.15,
    without it."""
    model = load_model(DEFAULT_MODEL, dtype=torch.bfloat16)
    texts = ("Write a short poem about the sea.\n", "Once upon a time", "The capital of France is")

    def asked(number: int) -> GenerateTask:
        seed, temperature, density = ((7, 1.0, 1.0), (42, 0.8, 0.75), (0, 0.0, 1.0))[number % 3]
        return GenerateTask(
            prompt=tuple(model.tokenizer.encode(texts[number % 3])),
            sampling=SamplingParams(seed=seed, temperature=temperature),
            stopping=StoppingParams(max_tokens=32, ignore_eos=True),
            pruning=PruningParams(density=density),
            top_logprobs=3,
        )

    with engine(model, prefill_source=None, batch_invariant=True) as running:
        alone = [made(submit(running, asked(number))[1]) for number in range(3)]
        for others in (1, 4, 8, 13):
            neighbours = [random_task(1000 * others + index) for index in range(others)]
            inboxes = [submit(running, each)[1] for each in neighbours]
            own = [submit(running, asked(number))[1] for number in range(3)]
            assert [made(inbox) for inbox in own] == alone, others
            for inbox in inboxes:
                finish(inbox)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "opt-norm-after"])
def test_a_row_that_stays_apart_makes_what_it_makes_otherwise(
    name: str, tiny: Callable[[str], Model], bfloat16: Callable[[str], Model]
) -> None:
    """In float32 within 1e-5, and in bfloat16 the same wherever it stands."""
    decoder = tiny(name).decoder
    assert invariant(bfloat16(name).decoder).rows_stay_apart()
    first = torch.arange(40, dtype=torch.int32).repeat(len(decoder.layers), 1)
    experts = SlimSpec.of_layers(decoder.spec.intermediate_size, first)
    views = [[layer.ff for layer in decoder.layers]] * 5 + [ZeroedLayers(decoder, experts)] * 6
    pool = decoder.new_pool(2 * len(views))
    with torch.inference_mode():
        zeroed = WholeView(views[-1], experts)
        step = invariant(decoder, pool)
        zeroed.slim_id = step.slims.add(zeroed)
        caches = [pool.allocate(2) for _ in views]
        sequences = [
            StepSequence(
                first_slot=cache.first_slot,
                cached=0,
                token_ids=(7 * number,),
                slim_id=zeroed.slim_id if number >= 5 else 0,
                slot=number,
            )
            for number, cache in enumerate(caches)
        ]
        apart = step.launch(sequences, [None] * len(sequences)).logits
        steps = [
            StepTokens(cache=cache, view=view, token_ids=[7 * number])
            for number, (cache, view) in enumerate(zip(caches, views, strict=True))
        ]
        together = torch.cat(decode_tokens(decoder, steps))
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


def invariant(decoder: Decoder, pool: KvPool | None = None) -> InvariantStep:
    sampler = Sampler(slots=16, vocab_size=decoder.spec.vocab_size, backend=decoder.backend)
    return InvariantStep(
        decoder=decoder,
        pool=pool or decoder.new_pool(0),
        sampler=sampler,
        slims=BlockTable(decoder),
    )


def test_batch_invariant_sessions_have_no_copies_and_auto_runs_dense(
    bfloat16: Callable[[str], Model],
) -> None:
    with engine(bfloat16("llama"), prefill_source=None, batch_invariant=True) as running:
        for sharing, density in (("private", 0.25), ("shared", 0.25), ("auto", 1.0)):
            task = replace(
                probe(1), pruning=PruningParams(density=0.25, sharing=sharing), keep=True
            )
            both = [submit(running, task)[1], submit(running, replace(task, turn_id="other"))[1]]
            for inbox in both:
                pruning = finish(inbox)[1].pruning
                assert pruning.mean_density == pytest.approx((1 + 15 * density) / 16)
            running.close("other").result(10)
        assert running.snapshot().result(10).views == ()


def test_batch_invariant_passes_read_one_prompt_each_and_short_ones_pass_long_ones(
    model: Model,
) -> None:
    queue = PrefillQueue(
        model.decoder, max_waiting=9, chunk_tokens=16, observer=Observer(), alone=True
    )
    order: list[tuple[int, int]] = []

    def noted(decoder: Decoder, parts: Sequence[Part], tell: Tell) -> Pass:
        order.append((len(parts), parts[0].prompt.tokens))
        return launch(decoder, parts, tell)

    queue.launch = noted
    for tokens in (40, 33, 5, 20):
        prompt = partial(Prompt, model.decoder, range(tokens), Selection(density=1.0))
        queue.add(PrefillRun(prompt, Inbox(), tokens=tokens, admitted=True), 0.0)
    while queue.has_work:
        queue.run_pass()
    # In turns the oldest and the one with the least left: of 40, 8; then of 33, 17.
    assert order == [(1, tokens) for tokens in (40, 5, 40, 40, 33, 33, 33, 20, 20)]


def test_batch_invariant_is_refused_where_it_does_not_hold(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InvariantStep, "rows_stay_apart", lambda step: False)
    running = Engine(model, batch_invariant=True)
    running.start()
    with pytest.raises(InvalidRequest, match=r"batch_invariant: got true with .*float32"):
        running.ready.result(10)
