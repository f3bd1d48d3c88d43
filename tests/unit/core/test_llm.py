"""Offline batches: what ``LLM`` gives, in which order, and that it leaves nothing behind."""

from __future__ import annotations

import gc
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import griffin_core
from griffin_core import LLM, SamplingParams, StoppingParams
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Finished, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.loop import EngineLoop
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import (
    CapacityExhausted,
    EngineFault,
    EngineStopped,
    InvalidRequest,
    NonFiniteLogits,
    SessionNotFound,
)
from griffin_core.model.load import Model
from griffin_core.offline.batch import run_tasks
from griffin_core.offline.completion import Piece
from griffin_core.offline.results import SUBMITTED_AHEAD
from tests.servers import eventually
from tests.tiny import CONTEXT
from tests.unit.core.engines import at_baseline, complete, engine

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
IDS = list(range(30, 50))
PROMPTS: list[Any] = ["The quick brown fox", IDS, CHAT, [("user", "a"), ("assistant", "b")], "é🙂"]
TEN = StoppingParams(max_tokens=10)


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Model]) -> Iterator[LLM]:
    """Private, so that what a prompt becomes does not depend on the others; of few places, so that
    prompts wait for one another."""
    with LLM(tiny("llama"), sharing="private", max_sessions=4, threads=1) as made:
        yield made
        eventually(lambda: at_baseline(made.engine))


@torch.inference_mode()
def transformers_greedy(directory: Path, prompts: list[Any], most: int) -> list[list[int]]:
    """The tokens that transformers' own generate makes of each prompt, by itself."""
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    made = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        elif isinstance(prompt[0], int):
            ids = prompt
        else:
            chat = [
                m if isinstance(m, dict) else dict(zip(("role", "content"), m, strict=True))
                for m in prompt
            ]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=most,
        )
        made.append(whole[0, len(ids) :].tolist())
    return made


def test_texts_ids_and_chats_give_what_transformers_generates(
    llm: LLM, tiny_directory: Callable[[str], Path]
) -> None:
    expected = transformers_greedy(tiny_directory("llama"), PROMPTS, 10)
    completions = llm.generate(PROMPTS, stopping=TEN)
    assert [list(completion.token_ids) for completion in completions] == expected
    for completion in completions:
        assert completion.text == llm.model.tokenizer.decode(
            [*completion.prompt_token_ids, *completion.token_ids]
        ).removeprefix(llm.model.tokenizer.decode(completion.prompt_token_ids))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: type(prompt[0]).__name__)
def test_a_prompt_may_come_without_a_list_around_it(llm: LLM, prompt: Any) -> None:
    assert len(llm.generate(prompt, stopping=TEN)) == 1
    (alone,), (listed,) = llm.generate(prompt, stopping=TEN), llm.generate([prompt], stopping=TEN)
    assert alone.token_ids == listed.token_ids


def test_no_prompts_give_no_completions(llm: LLM) -> None:
    assert llm.generate([]) == llm.chat([]) == llm.score_many([]) == []
    assert list(llm.generate([], stream=True)) == []


def test_a_completion_says_all_there_is_to_say(llm: LLM) -> None:
    (completion,) = llm.generate([IDS], density=0.5, stopping=TEN, top_logprobs=2)
    assert completion.prompt_token_ids == tuple(IDS)
    assert (completion.prompt_tokens, completion.generated_tokens) == (20, 10)
    assert completion.finish_reason == "max_tokens" and completion.stop == ""
    assert completion.logprobs is not None and len(completion.logprobs) == 10
    for token, item in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(item.top) == 2 and item.top[0] == (token, item.chosen)  # greedy
    pruning = completion.pruning
    assert (pruning.density, pruning.policy, pruning.experts_per_layer) == (0.5, "topk", 44)
    assert (pruning.mean_density, pruning.dense_tokens) == (pytest.approx(0.55), 1)
    assert 0 <= completion.timings.queue_s < completion.timings.first_token_s
    assert llm.generate([IDS], stopping=TEN)[0].logprobs is None


def test_a_stop_string_ends_a_completion(llm: LLM) -> None:
    (whole,) = llm.generate(IDS, stopping=TEN)
    stop = whole.text[3:5]
    (cut,) = llm.generate(IDS, stopping=StoppingParams(max_tokens=10, stop=(stop,)))
    assert (cut.finish_reason, cut.stop) == ("stop_sequence", stop)
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_results_are_in_order_whatever_ends_first(llm: LLM) -> None:
    prompts = [[token, *IDS[: 1 + token % 7]] for token in range(40)]
    lengths = [1 + (7 * token) % 23 for token in range(40)]
    stoppings = [StoppingParams(max_tokens=most, ignore_eos=True) for most in lengths]
    ended = [
        index
        for index, piece in llm.generate(prompts, stopping=stoppings, stream=True)
        if piece.completion is not None
    ]
    assert sorted(ended) == list(range(40)) != ended
    completions = llm.generate(prompts, stopping=stoppings)
    assert [list(c.prompt_token_ids) for c in completions] == prompts
    assert [c.generated_tokens for c in completions] == lengths
    for index in (0, 17, 39):
        (alone,) = llm.generate(prompts[index], stopping=stoppings[index])
        assert alone.token_ids == completions[index].token_ids


def test_a_bounded_number_is_submitted_at_once(model: Model) -> None:
    """An engine refuses more than its queue takes."""
    tasks = [
        GenerateTask(prompt=(token,), stopping=StoppingParams(max_tokens=3, ignore_eos=True))
        for token in range(40)
    ]
    limits = Limits(max_sessions=2, max_queue=3)
    with engine(model, limits=limits, prefill_source=None) as running:
        for whole in (True, False):
            events = list(run_tasks(running, tasks, most=5, whole=whole))
            ends = [index for index, event in events if isinstance(event, Finished)]
            assert sorted(ends) == list(range(40))
            made = Counter[int]()
            for index, event in events:
                if isinstance(event, TokensMade):
                    made[index] += len(event.ids)
            assert made == dict.fromkeys(range(40), 3)


def test_pieces_joined_are_the_completion(llm: LLM) -> None:
    pieces: dict[int, list[Piece]] = {}
    stopping = StoppingParams(max_tokens=30, ignore_eos=True)
    for index, piece in llm.generate(PROMPTS, stopping=stopping, top_logprobs=1, stream=True):
        pieces.setdefault(index, []).append(piece)
    whole = llm.generate(PROMPTS, stopping=stopping, top_logprobs=1)
    for index, expected in enumerate(whole):
        *made, last = pieces[index]
        assert len(made) > 5 and all(piece.completion is None for piece in made)
        assert last.completion is not None and not last.text and not last.token_ids
        assert last.completion.token_ids == expected.token_ids
        assert "".join(piece.text for piece in made) == last.completion.text == expected.text
        assert sum((piece.token_ids for piece in made), ()) == expected.token_ids
        assert sum((piece.logprobs for piece in made), ()) == last.completion.logprobs


@pytest.mark.parametrize("policy", ["topk", "sampled", "random"])
def test_experts_and_tokens_are_those_of_the_same_request_to_an_engine(
    llm: LLM, model: Model, policy: Any
) -> None:
    sampling = SamplingParams(temperature=0.8, seed=5)
    (ours,) = llm.generate(IDS, density=0.5, policy=policy, sampling=sampling, stopping=TEN)
    task = GenerateTask(
        prompt=tuple(IDS),
        sampling=sampling,
        stopping=TEN,
        pruning=PruningParams(density=0.5, policy=policy),
    )
    with engine(model) as running:
        tokens, finished = complete(running, task)
    assert list(ours.token_ids) == tokens
    assert ours.pruning.norm_mass == finished.pruning.norm_mass
    assert ours.pruning.policy == policy


def test_density_policy_and_sharing_default_to_the_llms(model: Model) -> None:
    with LLM(
        model, density=0.25, policy="magnitude", sharing="private", threads=1, max_sessions=2
    ) as llm:
        (inherited,) = llm.generate(IDS, stopping=TEN)
        (own,) = llm.generate(IDS, density=1.0, policy="topk", stopping=TEN)
    assert (inherited.pruning.density, inherited.pruning.policy) == (0.25, "magnitude")
    assert inherited.pruning.dense_tokens == 1
    assert (own.pruning.density, own.pruning.dense_tokens) == (1.0, own.generated_tokens)


def test_seeds_make_draws_repeatable_and_equal_prompts_differ(llm: LLM) -> None:
    warm = SamplingParams(temperature=1.0, seed=7)

    def draw(**options: Any) -> list[tuple[int, ...]]:
        made = llm.generate([IDS] * 3, sampling=warm, stopping=TEN, **options)
        return [completion.token_ids for completion in made]

    first = draw()
    assert len(set(first)) == 3
    assert draw() == draw(seed=7) == draw(seed=[7, 8, 9]) == first
    assert draw(seed=8)[:2] == first[1:]
    assert draw(seed=2**64 - 1)[1:] == draw(seed=0)[:2]
    own = [SamplingParams(temperature=1.0, seed=8)] * 3
    made = llm.generate([IDS] * 3, sampling=own, stopping=TEN)
    assert [completion.token_ids for completion in made] == [first[1]] * 3


def test_sampling_and_stopping_may_be_each_prompts_own(llm: LLM) -> None:
    banned = frozenset(range(100, 110))
    made = llm.generate(
        [IDS, IDS],
        sampling=[SamplingParams(allowed_token_ids=banned), SamplingParams()],
        stopping=[TEN, StoppingParams(max_tokens=3, ignore_eos=True)],
    )
    assert set(made[0].token_ids) <= banned and made[1].generated_tokens == 3


def test_bad_words_are_in_no_completion(llm: LLM) -> None:
    (free,) = llm.generate(IDS, stopping=TEN)
    letter = next(character for character in free.text if character.isascii())
    (bound,) = llm.generate(IDS, stopping=TEN, bad_words=[letter])
    assert letter not in bound.text and bound.generated_tokens > 0


def test_options_of_texts_and_chats_reach_the_tokenizer(llm: LLM) -> None:
    chat = [("user", "a"), ("assistant", "b")]
    (continued,) = llm.chat(chat, continue_final_message=True, stopping=TEN)
    assert llm.model.tokenizer.decode(continued.prompt_token_ids) == "<user>a\n<assistant>b"
    (answered,) = llm.chat(chat, stopping=TEN)
    assert llm.model.tokenizer.decode(answered.prompt_token_ids).endswith("b\n<assistant>")
    two = llm.chat([chat, CHAT], stopping=TEN)
    assert two[0].prompt_token_ids == answered.prompt_token_ids != two[1].prompt_token_ids
    streamed = dict(llm.chat(chat, stopping=TEN, stream=True))
    assert streamed[0].completion is not None
    assert streamed[0].completion.token_ids == answered.token_ids


def test_scores_are_those_of_an_engine_and_of_transformers(
    llm: LLM, model: Model, tiny_directory: Callable[[str], Path]
) -> None:
    text = llm.score("The quick brown", " fox jumps")
    ids = model.tokenizer.encode("The quick brown fox jumps")
    reference = AutoModelForCausalLM.from_pretrained(tiny_directory("llama"), dtype=torch.float32)
    with torch.inference_mode():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(dim=1)
    chosen = [float(logprobs[at - 1, ids[at]]) for at in range(text.context_tokens, len(ids))]
    assert [token.id for token in text.tokens] == ids[text.context_tokens :]
    assert [token.logprob for token in text.tokens] == pytest.approx(chosen, abs=1e-4)
    assert text.logprob == pytest.approx(sum(chosen), abs=1e-3)
    task = ScoreTask(
        prompt=tuple(IDS), continuations=((1, 2, 3),), pruning=PruningParams(density=0.5), seed=0
    )
    with engine(model) as running:
        (scored,) = complete(running, task)[1].continuations
    pairs = [(IDS[:n], [1, 2, 3]) for n in range(1, 21)]
    scores = llm.score_many(pairs, density=0.5)
    assert [score.context_tokens for score in scores] == list(range(1, 21))
    last = scores[-1]
    assert [t.logprob for t in last.tokens] == pytest.approx(list(scored.logprobs), abs=1e-5)
    assert [t.greedy for t in last.tokens] == list(scored.greedy)
    assert last.pruning.density == 0.5 and last.logprob == pytest.approx(sum(scored.logprobs))


def test_choices_are_scored_behind_one_context_in_either_mode(llm: LLM) -> None:
    items: list[Any] = [(IDS[:n], [[1, 2, 3], [4], IDS[:n]]) for n in range(2, 12)]
    items.append(("The quick", [" brown fox", " red", " brown"]))
    for mode in ("generation", "classification"):
        options: Any = {"mode": mode, "density": 0.5, "policy": "sampled"}
        scores = llm.score_choices(items, seed=7, **options)
        pairs = [(context, one) for context, choices in items for one in choices]
        seeds = [7 + index for index, (_, choices) in enumerate(items) for _ in choices]
        alone = llm.score_many(pairs, seed=seeds, **options)
        assert [len(each) for each in scores] == [3] * 11
        together = [score for each in scores for score in each]
        for one, other in zip(together, alone, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.greedy == other.greedy and one.context_tokens == other.context_tokens
            assert [t.id for t in one.tokens] == [t.id for t in other.tokens]
        single = llm.score(*pairs[4], seed=8, **options)
        assert single.logprob == pytest.approx(alone[4].logprob, abs=1e-4)
    assert llm.score_choices([]) == []


def test_choices_come_as_they_are_scored_and_may_be_left(llm: LLM, model: Model) -> None:
    items = [(IDS, [[1] * 30, [2] * 20])] * 30
    whole = llm.score_choices(items, mode="classification")
    stream = llm.score_choices(items, mode="classification", stream=True)
    come = dict(stream)
    assert sorted(come) == list(range(30))
    for index, scores in come.items():
        assert [score.logprob for score in scores] == pytest.approx(
            [score.logprob for score in whole[index]], abs=1e-4
        )
    stream = llm.score_choices(items * 10, stream=True)
    next(stream)
    stream.close()
    eventually(lambda: at_baseline(llm.engine))


@pytest.mark.parametrize(
    ("item", "options", "words"),
    [
        (("a", "b"), {}, r"items\[1\]\.continuations: got b; allowed: a list of texts or of"),
        (([1], [2, 3]), {}, r"items\[1\]\.continuations: got \[2, 3\]; allowed: a list of"),
        (("a", 5), {}, r"items\[1\]\.continuations: got 5; allowed: a list of texts or of"),
        (("a", []), {}, r"items\[1\]\.continuations: got 0 of them; allowed: 1 to 256"),
        (("a", ["b"] * 257), {}, r"items\[1\]\.continuations: got 257 of them; allowed: 1 to"),
        (("a", ["b", [1]]), {}, r"items\[1\]\.continuations\[1\]: got str with list; allowed"),
        (("a", ["b", ""]), {}, r"items\[1\]\.continuations\[1\]: got no tokens"),
        (([1], [[1], []]), {}, r"items\[1\]\.continuations\[1\]: got a prompt of no tokens"),
        (([1], [[1], [260]]), {}, r"items\[1\]\.continuations\[1\]\[0\]: got 260"),
        (("a", ["b"]), {"mode": "classification"}, r"items\[1\]\.context: got one token"),
        (("a", ["b"]), {"mode": "paper"}, r"mode: got paper; allowed: generation, classif"),
        (("a", ["b"]), {"seed": [1]}, r"seed: got 1 for 2 prompts"),
        (("a", ["b"]), {"seed": "xy"}, r"seed: got x; allowed: \[0, 2\^64\), a whole number"),
        (("a", ["b"]), {"seed": 1.5}, r"seed: got 1\.5; allowed"),
        (("a", ["b"]), {"density": 0}, r"pruning\.density: got 0"),
        (("a", ["b"]), {"density": "0.5"}, r"pruning\.density: got 0\.5"),
        ("ab", {}, r"items\[1\]: got ab; allowed: a pair: context and continuations"),
        ((1, 2, 3), {}, r"items\[1\]: got \(1, 2, 3\); allowed: a pair"),
        (5, {}, r"items\[1\]: got 5; allowed: a pair"),
    ],
)
def test_bad_choices_are_refused_before_anything_runs(
    item: Any, options: Any, words: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "submit", lambda *_: pytest.fail("work was begun"))
    for stream in (False, True):
        with pytest.raises(InvalidRequest, match=f"^{words}"):
            llm.score_choices([("good", ["a", "b"]), item], stream=stream, **options)


GOOD = "a good prompt"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([GOOD, GOOD, GOOD, ""], r"^prompts\[3\]\.text: got an empty prompt; allowed: at least"),
        ([GOOD, "a" * CONTEXT], rf"^prompts\[1\]\.text: got {CONTEXT} tokens; allowed: at most"),
        ([GOOD, [1] * 999], r"^prompts\[1\]\.token_ids: got 999 tokens"),
        ([GOOD, [1, 2, 260]], r"^prompts\[1\]\.token_ids\[2\]: got 260; allowed: \[0, 260\)"),
        ([GOOD, [1, -1]], r"^prompts\[1\]\.token_ids\[1\]: got -1"),
        ([GOOD, []], r"^prompts\[1\]\.token_ids: got a prompt of no tokens"),
        ([GOOD, [1, "a"]], r"^prompts\[1\]\.prompt: got \[1, 'a'\]; allowed: a text, a chat"),
        ([GOOD, [1, True]], r"^prompts\[1\]\.prompt"),
        ([GOOD, None], r"^prompts\[1\]\.prompt: got None"),
        ([GOOD, ["user", "a"]], r"^prompts\[1\]\.prompt"),
        ([GOOD, [{"role": "user"}]], r"^prompts\[1\]\.messages\[0\]: got role; allowed: role and"),
        ([GOOD, [{"role": "", "content": ""}]], r"^prompts\[1\]\.messages\[0\]\.role: got ''"),
        (
            [GOOD, [{"role": "user", "content": [{"type": "text", "text": "a"}]}]],
            r"^prompts\[1\]\.messages\[0\]\.content: .* allowed: a string",
        ),
        ([CHAT, [("tool", "a")]], r"^prompts\[1\]\.messages: got roles tool; .*no tools"),
        ({"role": "user", "content": "a"}, r"^prompts: got \{'role"),
        (b"bytes", "^prompts: "),
        (7, "^prompts: got 7"),
        (torch.tensor([1, 2]), r"^prompts\[0\]\.prompt: got tensor\(1\)"),
    ],
)
def test_a_bad_prompt_among_good_ones_is_refused_before_any_is_run(
    model: Model, monkeypatch: pytest.MonkeyPatch, llm: LLM, prompts: Any, words: str
) -> None:
    monkeypatch.setattr(Engine, "submit", lambda *_: pytest.fail("work was begun"))
    for stream in (False, True):
        with pytest.raises(InvalidRequest, match=words):
            llm.generate(prompts, stream=stream)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.0}, r"density: got 0\.0; allowed: \(0, 1\]"),
        ({"density": float("nan")}, "density: got nan"),
        ({"policy": "best"}, "policy: got best; allowed: topk, sampled"),
        ({"sharing": "never"}, "sharing: got never; allowed: private, shared, auto"),
        ({"seed": -1}, r"^seed: got -1; allowed: \[0, 2\^64\)"),
        ({"seed": [1]}, "^seed: got 1 for 2 prompts"),
        ({"sampling": [SamplingParams()]}, "^sampling: got 1 for 2 prompts; allowed: one, or one"),
        ({"stopping": [StoppingParams()] * 3}, "^stopping: got 3 for 2 prompts"),
        ({"top_logprobs": 21}, r"top_logprobs: got 21; allowed: \[0, 20\]"),
        ({"bad_words": [""]}, r"bad_words\[0\]"),
        ({"continue_final_message": True}, "continue_final_message: got true with text"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs: got set with text"),
        ({"stopping": StoppingParams(stop_token_ids=frozenset([999]))}, r"stop_token_ids\[0\]"),
        (
            {
                "sampling": SamplingParams(allowed_token_ids=frozenset([257])),
                "stopping": StoppingParams(min_tokens=1),
            },
            r"^prompts\[0\]\.sampling\.allowed_token_ids: got no token left to draw after 0 tokens",
        ),
    ],
)
def test_bad_options_are_refused_before_any_prompt_is_run(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(Engine, "submit", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(InvalidRequest, match=words):
        llm.generate(["a", "b"], **options)


def test_what_is_no_chat_is_refused_by_chat_and_bad_pairs_by_score(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages\[1\]: got a text; allowed: a chat"):
        llm.chat([CHAT, "a text"])  # type: ignore[list-item]
    for pair, words in (
        (("a", [1]), r"^pairs\[0\]\.continuation: got str with list; allowed: both"),
        (("a", ""), r"^pairs\[0\]\.continuation: got no tokens"),
        (("", "a"), r"^pairs\[0\]\.context: got no tokens"),
        (([], [1]), r"^pairs\[0\]\.context: got a prompt of no tokens"),
        (([1], [260]), r"^pairs\[0\]\.continuation\[0\]: got 260"),
        (([1, 1], [2] * CONTEXT), rf"^pairs\[0\]\.continuation: got {CONTEXT + 2} tokens"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            llm.score(*pair)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="add_special_tokens"):
        llm.score([1], [2], add_special_tokens=True)
    with pytest.raises(InvalidRequest, match=r"^pairs\[0\]: got \(1, 2, 3\); allowed: a pair"):
        llm.score_many([(1, 2, 3)])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match=r"^pairs: got a text;"):
        llm.score_many("a text")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 2}, "density: got 2"),
        ({"policy": "best"}, "policy: got best"),
        ({"sharing": "all"}, "sharing: got all"),
        ({"threads": 0}, "^threads: got 0; allowed: >= 1"),
        ({"max_sessions": 0}, "^max_sessions: got 0; allowed: >= 1"),
        ({"memory_fraction": 1.5}, r"^memory_fraction: got 1\.5; allowed: \(0, 1\]"),
        ({"dtype": "int4"}, "^dtype: got int4; allowed: float32, bfloat16, float16"),
        ({"dtype": torch.int8}, "^dtype: got torch.int8"),
        ({"device": "tpu"}, "^device: got tpu; allowed: cpu, .*auto"),
    ],
)
def test_bad_arguments_are_refused_at_construction(
    tiny_directory: Callable[[str], Path], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        LLM(str(tiny_directory("llama")), **options)


def test_a_loaded_model_has_its_dtype_and_device(model: Model) -> None:
    for options in ({"dtype": "float32"}, {"device": "cpu"}):
        with pytest.raises(InvalidRequest, match="with a model that is loaded"):
            LLM(model, **options)  # type: ignore[arg-type]


def test_a_model_is_loaded_by_name(tiny_directory: Callable[[str], Path], llm: LLM) -> None:
    told: list[str] = []
    directory = str(tiny_directory("llama"))
    with LLM(
        directory, dtype="float32", batch_invariant=True, progress=told.append, threads=1
    ) as loaded:
        assert loaded.model.decoder.dtype is torch.float32
        made = loaded.generate([IDS, "b"], stopping=TEN)
    assert any("loading llama as float32" in words for words in told)
    expected = llm.generate([IDS, "b"], stopping=TEN)
    assert [c.token_ids for c in made] == [c.token_ids for c in expected]


def test_what_has_never_room_is_refused_before_any_prompt_is_run(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "submit", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(Engine, "session_bytes", 10_000)
    with pytest.raises(CapacityExhausted, match=r"^prompts\[1\]: memory: .* 10000 in all"):
        llm.generate([[1], IDS], stopping=StoppingParams(max_tokens=1))


class Stop(Exception):
    """What a consumer raises."""


ENDLESS = StoppingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The turns that are submitted from here on."""
    turns: list[str] = []
    submit = Engine.submit

    def noted(self: Engine, task: Any, sink: Any) -> str:
        turns.append(task.turn_id)
        return submit(self, task, sink)

    monkeypatch.setattr(Engine, "submit", noted)
    return turns


def assert_all_cancelled(llm: LLM, turns: list[str]) -> None:
    assert 4 < len(turns) <= 4 + SUBMITTED_AHEAD  # some of them wait
    eventually(lambda: at_baseline(llm.engine))
    for turn in turns:
        with pytest.raises(SessionNotFound, match="its caller went away"):
            llm.engine.session(turn).result(10)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_in_a_streams_consumer_frees_everything(
    llm: LLM, submitted: list[str], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        for _ in llm.generate([IDS] * 30, stopping=ENDLESS, density=0.5, stream=True):
            raise error
    assert_all_cancelled(llm, submitted)
    assert len(llm.generate(["a"], stopping=TEN)) == 1


@pytest.mark.parametrize("at", [5, 12])
def test_an_interrupt_frees_everything(
    llm: LLM, submitted: list[str], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Between two prompts, and with the last one that is handed over at first."""
    submit = Engine.submit

    def interrupted(self: Engine, task: Any, sink: Any) -> str:
        turn_id = submit(self, task, sink)
        if len(submitted) == at:
            signal.raise_signal(signal.SIGINT)
        return turn_id

    monkeypatch.setattr(Engine, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([IDS] * 30, stopping=ENDLESS)
    assert len(submitted) == at
    assert_all_cancelled(llm, submitted)


def test_an_interrupt_ends_the_wait_for_results(llm: LLM, submitted: list[str]) -> None:
    main = threading.get_ident()

    def interrupt() -> None:
        eventually(lambda: len(submitted) == 4 + SUBMITTED_AHEAD, within_s=60)
        signal.pthread_kill(main, signal.SIGINT)

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.submit(interrupt)
        llm.generate([IDS] * 30, stopping=ENDLESS)
    assert_all_cancelled(llm, submitted)


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_stream_that_is_closed_or_dropped_ends_its_work(
    llm: LLM, submitted: list[str], how: str
) -> None:
    stream = llm.generate([IDS] * 30, stopping=ENDLESS, stream=True)
    next(stream)
    if how == "closed":
        stream.close()
    else:
        del stream
        gc.collect()
    assert_all_cancelled(llm, submitted)


def test_a_stream_nobody_reads_does_not_keep_others_from_their_turn(llm: LLM) -> None:
    stream = llm.generate([IDS] * 30, stopping=TEN, stream=True)
    index, _ = next(stream)
    (other,) = llm.generate("a question about the first piece", stopping=TEN)
    assert other.generated_tokens > 0
    ended = [i for i, piece in stream if piece.completion is not None]
    assert index == 0 and sorted(ended) == list(range(30))


def test_an_error_of_one_prompt_ends_the_call_and_names_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from griffin_core.engine.generation import Generation  # noqa: PLC0415

    take = Generation.take

    def failing(self: Generation, session: Any, drawn: Any) -> bool:
        if session.tokens[0] == 13 and session.turn_generated == 2:
            raise NonFiniteLogits(position=9)
        return take(self, session, drawn)

    monkeypatch.setattr(Generation, "take", failing)
    prompts = [[token, 5] for token in range(30)]
    with pytest.raises(NonFiniteLogits) as raised:
        llm.generate(prompts, stopping=StoppingParams(max_tokens=20, ignore_eos=True))
    assert raised.value.__notes__ == ["in prompts[13]"]
    eventually(lambda: at_baseline(llm.engine))


def test_several_threads_get_what_each_asked_for(llm: LLM) -> None:
    prompts = [[[token, 100 + n] for token in range(12)] for n in range(6)]
    alone = [[c.token_ids for c in llm.generate(batch, stopping=TEN)] for batch in prompts]

    def run(n: int) -> list[tuple[int, ...]]:
        if n % 2:
            return [c.token_ids for c in llm.generate(prompts[n], stopping=TEN)]
        stream = llm.generate(prompts[n], stopping=TEN, stream=True)
        done = {i: p.completion.token_ids for i, p in stream if p.completion is not None}
        return [done[i] for i in range(12)]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, range(6))) == alone


def engine_threads() -> set[threading.Thread]:
    """The threads of all engines that run."""
    return {thread for thread in threading.enumerate() if thread.name == "griffin-engine"}


def test_close_ends_the_thread_may_be_repeated_and_is_final(model: Model) -> None:
    before = engine_threads()
    llm = LLM(model, threads=1, max_sessions=2)
    (thread,) = engine_threads() - before
    assert thread.is_alive()
    stream = llm.generate([IDS] * 9, stopping=StoppingParams(max_tokens=200), stream=True)
    next(stream)
    unread = llm.generate("a", stream=True)
    llm.close()
    llm.close()
    assert not thread.is_alive()
    for use in (
        lambda: llm.generate("a"),
        lambda: llm.generate("a", stream=True),
        lambda: llm.score("a", "b"),
        lambda: list(unread),
        lambda: list(stream),
    ):
        with pytest.raises(EngineStopped, match="the LLM is closed"):
            use()


def test_close_ends_calls_of_other_threads(model: Model) -> None:
    llm = LLM(model, threads=1, max_sessions=2)
    began = threading.Event()

    def run() -> None:
        stopping = StoppingParams(max_tokens=200, ignore_eos=True)
        for _ in llm.generate([IDS] * 100, stopping=stopping, stream=True):
            began.set()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        assert began.wait(30)
        llm.close()
        with pytest.raises(EngineStopped, match="the LLM is closed"):
            running.result(30)


def test_an_exception_in_the_block_ends_the_thread(model: Model) -> None:
    before = engine_threads()
    with pytest.raises(KeyboardInterrupt), LLM(model, threads=1, max_sessions=2):
        (thread,) = engine_threads() - before
        raise KeyboardInterrupt
    assert not thread.is_alive()


def test_an_llm_nobody_refers_to_ends_its_thread(model: Model) -> None:
    before = engine_threads()
    llm = LLM(model, threads=1, max_sessions=2)
    (thread,) = engine_threads() - before
    del llm
    gc.collect()
    assert not thread.is_alive()


def test_an_engine_that_does_not_start_leaves_no_thread(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def fails(*_: object) -> None:
        threads.append(threading.current_thread())
        raise CapacityExhausted("no room", retry_after_s=None)

    monkeypatch.setattr("griffin_core.engine.memory.budget_from_cpu", fails)
    with pytest.raises(CapacityExhausted, match="no room"):
        LLM(model, threads=1)
    assert len(threads) == 1 and not threads[0].is_alive()


def test_a_bug_that_ends_the_engine_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(model, threads=1, max_sessions=2) as llm:
        monkeypatch.setattr(EngineLoop, "step", lambda _: 1 / 0)
        for _ in range(2):
            with pytest.raises(EngineFault, match="the engine ended: ZeroDivisionError"):
                llm.generate(["a"] * (2 + 2 * SUBMITTED_AHEAD))


def test_the_package_exports_what_offline_batches_take() -> None:
    for name in ("LLM", "SamplingParams", "StoppingParams"):
        assert name in dir(griffin_core) and getattr(griffin_core, name).__name__ == name
