"""Tokenizer: text streams in whole characters, chats by the model's template."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from griffin_core.errors import InvalidRequest
from griffin_core.model.load import Model

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
