"""Tokenizer: text streams in whole characters, chats by the model's template."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from griffin_core.errors import BadModelFile, InvalidRequest
from griffin_core.model.load import Model
from griffin_core.text.tokenizer import CHARACTERS_PER_TOKEN, Tokenizer, load_tokenizer
from tests.tiny import byte_tokenizer
from tests.tokenizer_kinds import KINDS

TEXTS = [
    "plain words, and  two spaces\n\nand lines",
    "naïve café — “quotes”",
    "漢字かな交じり文、한국어 텍스트",
    "Привет, мир! שלום עולם مرحبا",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and a flag 🇪🇺",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_whole_text(text: str, smollm2: Model) -> None:
    ids = smollm2.tokenizer.encode(text)
    stream = smollm2.tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_stream_to_what_they_decode_to(smollm2: Model) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(49152) for _ in range(rng.randrange(1, 30))]
        stream = smollm2.tokenizer.stream()
        streamed = "".join(stream.push(token) for token in ids) + stream.flush()
        assert streamed == smollm2.tokenizer.decode(ids)


def test_special_tokens_are_not_text(smollm2: Model) -> None:
    ids = smollm2.tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert smollm2.tokenizer.decode(ids) == "hi"
    assert smollm2.tokenizer.decode_one(ids[0]) == "<|im_start|>"


def test_chats_are_rendered_by_the_template(smollm2: Model) -> None:
    ids = smollm2.tokenizer.encode_chat([("system", "Be brief."), ("user", "Hi")])
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ids == smollm2.tokenizer.encode(expected)


def test_a_model_without_template_takes_no_chat(tiny: Callable[[str], Model]) -> None:
    assert not tiny("opt").tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tiny("opt").tokenizer.encode_chat([("user", "Hi")])


def test_what_a_template_refuses_is_told_in_its_words(tiny: Callable[[str], Model]) -> None:
    with pytest.raises(InvalidRequest, match=r"roles tool; allowed: .*no tools"):
        tiny("llama").tokenizer.encode_chat([("tool", "x")])


def test_truncation_and_padding_that_a_file_stores_are_not_applied(tmp_path: Path) -> None:
    for settings in (
        {"truncation": True, "max_length": 64},
        {"padding": "max_length", "max_length": 500, "truncation": True},
        {"padding": "longest", "pad_to_multiple_of": 64},
        {"truncation": True, "max_length": 30, "stride": 5},
    ):
        trained = byte_tokenizer(with_template=True)
        trained(["a"], **settings)  # what a training script leaves behind
        trained.save_pretrained(tmp_path)
        assert trained.backend_tokenizer.truncation or trained.backend_tokenizer.padding
        tokenizer = load_tokenizer(str(tmp_path))
        text = "y" * 200
        assert len(tokenizer.encode(text)) == 200
        assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
        assert len(tokenizer.encode_chat([("user", text)])) == len(f"<user>{text}\n<assistant>")
        assert [len(part) for part in tokenizer.encode_pair("a" * 150, "b" * 50)] == [150, 50]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_text_is_tokenized_as_transformers_does(name: str) -> None:
    theirs = KINDS[name]()
    ours = Tokenizer(theirs)
    for text in [*TEXTS, " a", "<s>a</s>", "e\u0301"]:
        assert ours.encode(text) == theirs(text).input_ids
        bare = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special_tokens=False) == bare


PIECES = (
    "the capital",
    " of",
    " ",
    "  ",
    "Paris",
    "é",
    "😀",
    "漢",
    "字",
    "\n",
    "e",
    "\u0301",
    "a b",
)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_score_is_of_the_tokens_that_reach_into_the_continuation(name: str) -> None:
    """They are the last ones of the whole, cover the continuation, and no token before them has a
    part of it."""
    theirs = KINDS[name]()
    ours, other_tokens = Tokenizer(theirs), 0
    for context, continuation in itertools.product(PIECES, repeat=2):
        prompt, rest = ours.encode_pair(context, continuation)
        whole = ours.encode(context + continuation)
        assert prompt + rest == whole
        alone = ours.encode(context)
        if whole[: len(alone)] == alone:
            assert prompt == alone
            continue
        other_tokens += 1
        joined = unicodedata.normalize("NFC", context + continuation)
        if name == "qwen" and joined != context + continuation:  # over the border
            assert ours.decode(rest).endswith(joined[-1])
            continue
        ends = theirs(context + continuation, return_offsets_mapping=True).offset_mapping
        assert all(end <= len(context) for _, end in ends[: len(prompt)])
        assert ends[len(prompt)][1] > len(context)
    assert other_tokens > 3  # cases in which the context's tokens are not the first of the whole


def test_a_score_splits_within_a_word_where_its_tokens_do() -> None:
    tokenizer = Tokenizer(KINDS["llama2"]())
    shown = [
        [tokenizer.decode_one(token) for token in part]
        for part in tokenizer.encode_pair("the capital o", "f")
    ]
    assert "".join(shown[1]).endswith("of")
    assert "o" not in "".join(shown[0])


@pytest.mark.parametrize("begins", ["", "<s>"])
@pytest.mark.parametrize("ends", ["</s>", "</s> </s>"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_token_that_a_tokenizer_puts_after_texts_is_in_prompts_and_in_no_score(
    name: str, ends: str, begins: str
) -> None:
    theirs = KINDS[name]()
    theirs.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    plain = Tokenizer(KINDS[name]())
    theirs.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begins} $A {ends}".strip(),
        special_tokens=[("<s>", theirs.bos_token_id), ("</s>", theirs.eos_token_id)],
    )
    begin = [theirs.bos_token_id] if begins else []
    tokenizer = Tokenizer(theirs)
    for text in (*TEXTS, "</s>"):
        assert theirs(text).input_ids[-1] == theirs.eos_token_id
        assert tokenizer.encode(text) == theirs(text).input_ids
    for context, continuation in itertools.product(PIECES, repeat=2):
        prompt, rest = plain.encode_pair(context, continuation, special_tokens=False)
        assert tokenizer.encode_pair(context, continuation) == (begin + prompt, rest)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_tokens_beyond_a_vocabulary_are_found_unless_they_were_added(name: str) -> None:
    theirs = KINDS[name]()
    ordinary = set(theirs.backend_tokenizer.get_vocab(with_added_tokens=False).values())
    ordinary -= theirs.backend_tokenizer.get_added_tokens_decoder().keys()
    last = max(ordinary)
    theirs.add_tokens(["<more>"])
    tokenizer = Tokenizer(theirs)
    assert tokenizer.ordinary_tokens_from(last + 1) == []
    assert tokenizer.ordinary_tokens_from(last) == [theirs.convert_ids_to_tokens(last)]
    assert len(tokenizer.ordinary_tokens_from(0)) == len(ordinary)


@pytest.mark.parametrize(
    ("context", "continuation", "tokens"),
    [("xa", "b", (1, 0)), ("a", "b", (0, 0)), ("xa", "by", (1, 1)), ("x", "ab", (1, 0))],
)
def test_a_continuation_that_takes_the_contexts_end_away_is_split_all_the_same(
    context: str, continuation: str, tokens: tuple[int, int]
) -> None:
    tokenizer = KINDS["gpt2"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ab", "")
    prompt, rest = Tokenizer(tokenizer).encode_pair(context, continuation)
    assert (len(prompt), len(rest)) == tokens


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Characters that were given to tokenizers."""
    seen: list[int] = []
    backend = PreTrainedTokenizerFast.backend_tokenizer.fget

    class Counting:
        """A backend whose texts are counted."""

        def __init__(self, counted: Any) -> None:
            self.counted = counted

        def __getattr__(self, name: str) -> Any:
            return getattr(self.counted, name)

        def encode_batch(self, texts: list[str], **options: Any) -> Any:
            seen.extend(len(text) for text in texts)
            return self.counted.encode_batch(texts, **options)

    counting = property(lambda tokenizer: Counting(backend(tokenizer)))
    monkeypatch.setattr(PreTrainedTokenizerFast, "backend_tokenizer", counting)
    return seen


@pytest.mark.parametrize("name", sorted(KINDS))
def test_of_a_text_that_cannot_fit_only_the_beginning_is_tokenized(
    name: str, counted: list[int]
) -> None:
    tokenizer = Tokenizer(KINDS[name]())
    for text in (
        "The quick brown fox. " * 50_000,
        "漢" * 500_000,
        "x" * 1_000_000,
        "é😀" * 400_000,
    ):
        counted.clear()
        with pytest.raises(InvalidRequest, match=f"{len(text)} characters.*at most 100 tokens"):
            tokenizer.encode(text, most=100)
        assert sum(counted) <= 100 * CHARACTERS_PER_TOKEN
    with pytest.raises(InvalidRequest, match="context: got 1050000 characters"):
        tokenizer.encode_pair("The quick brown fox. " * 50_000, "a", most=100)
    with pytest.raises(InvalidRequest, match="continuation: got 1050001 characters"):
        tokenizer.encode_pair("a", "The quick brown fox. " * 50_000, most=100)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_whatever_fits_is_taken_and_one_token_more_is_not(name: str) -> None:
    tokenizer = Tokenizer(KINDS[name]())
    for text in ("the capital of", "a" * 3000, "  " * 3000, "\n" * 3000, "😀" * 99):
        ids = tokenizer.encode(text)
        assert tokenizer.encode(text, most=len(ids)) == ids
        with pytest.raises(InvalidRequest, match="at most"):
            tokenizer.encode(text, most=len(ids) - 1)


def test_a_text_that_the_normalizer_shortens_is_taken() -> None:
    theirs = KINDS["gpt2"]()
    theirs.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    tokenizer = Tokenizer(theirs)
    assert tokenizer.encode(" " * 1_000_000 + "a", most=10) == tokenizer.encode(" a")


def test_tokenizing_does_not_stop_other_threads() -> None:
    tokenizer, done, turns = Tokenizer(KINDS["gpt2"]()), threading.Event(), []

    def run() -> None:
        tokenizer.encode("The quick brown fox. " * 20_000)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    while not done.wait(0.001):
        turns.append(time.perf_counter())
    thread.join()
    assert len(turns) > 10


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: cannot be read"),
        ("tokenizer.json", "", "tokenizer.json: cannot be read"),
        ("tokenizer.json", "{}", "tokenizer.json: is not a tokenizer"),
        (
            "tokenizer.json",
            '{"version": "1.0", "added_tokens": [], "model": {"type": "New"}}',
            "is not a",
        ),
        ("tokenizer_config.json", "{", "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: is not a JSON object"),
        ("tokenizer.json", None, "the model has no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_told_in_one_line(
    file: str, content: str | None, message: str, tmp_path: Path
) -> None:
    byte_tokenizer(with_template=False).save_pretrained(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(BadModelFile) as refused:
        load_tokenizer(str(tmp_path))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer"])
def test_a_tokenizer_class_without_files_is_refused(name: str, tmp_path: Path) -> None:
    """transformers makes one that knows its special tokens only, and text becomes nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(BadModelFile, match=r"tokenizer.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("installed", [True, False])
def test_a_sentencepiece_model_that_cannot_be_read_asks_for_what_helps(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    monkeypatch.setattr("griffin_core.text.tokenizer.find_spec", lambda name: installed or None)
    with pytest.raises(BadModelFile) as refused:
        load_tokenizer(str(tmp_path))
    assert str(refused.value).startswith("tokenizer.model: ")
    assert "sentencepiece" in str(refused.value)
    assert "tokenizer.json" in str(refused.value)
    assert "tiktoken" not in str(refused.value)


def test_a_sentencepiece_model_alone_is_read(tmp_path: Path) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = [f"line {number} of some words, é and 漢" for number in range(200)]
    trainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # as of Llama 2
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(str(tmp_path))
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(
        model_file=str(tmp_path / "tokenizer.model")
    )
    for text in ("some words", "line 7 of é 😀", "漢\nand"):
        assert tokenizer.encode(text, special_tokens=False) == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == text
