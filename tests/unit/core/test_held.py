"""What a kept session holds after a stop string: the tokens of what its client has seen."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from griffin_core.engine.after_stop import MAX_SPLITS, tokens_after_stop
from griffin_core.sampling.stopping import FinishReason, StopChecker, StoppingParams
from griffin_core.text.tokenizer import Tokenizer
from tests.tokenizer_kinds import KINDS
from tests.unit.core.pieces import Pieces, chunkings, llama2_tokenizer, parts

RANDOM_TEXTS = [100, pytest.param(5_000, marks=pytest.mark.slow)]


def held(
    tokenizer: Tokenizer,
    before: Sequence[int],
    made: Sequence[int],
    vocabulary: int = 100_000,
    **params: object,
) -> tuple[str, list[int], int]:
    """The text that was shown until a stop string ended it, the tokens that are held of it, and
    how many of them were drawn."""
    stopping = StoppingParams(**params)
    checker = StopChecker(stopping, tokenizer, frozenset(), before=before, room=1000)
    shown, reason, drawn = "", None, []
    for token in made:
        text, reason = checker.push(token)
        shown += text
        drawn.append(token)
        if reason is not None:
            break
    assert reason is FinishReason.STOP_SEQUENCE
    kept, anew = tokens_after_stop(
        tokenizer,
        before,
        drawn,
        checker,
        vocab_size=vocabulary,
        skip_special_tokens=stopping.skip_special_tokens,
    )
    assert all(token < vocabulary for token in anew)
    return shown, [*drawn[:kept], *anew], kept


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stop"),
    [
        (" red\nA: x", "\nA:"),
        ("abcabd", "abd"),
        ("aé€😀b", "€"),
        ("é😀ab", "é"),
        ("a\ufffd.b", "."),
    ],
)
def test_whatever_the_tokens_the_text_is_held_and_no_more(
    text: str, stop: str, include: bool
) -> None:
    pieces = Pieces(parts(text.encode()))
    before = pieces.ids(*"Q:")
    for cut in chunkings(text.encode()):
        made = pieces.ids(*cut)
        shown, tokens, kept = held(
            pieces.tokenizer, before, made, stop=(stop,), include_stop_string=include
        )
        assert shown == text[: text.find(stop) + include * len(stop)]
        assert pieces.tokenizer.decode(tokens) == shown
        # Only the token in which the text ends is made anew.
        ends = [len(b"".join(cut[:n])) for n in range(len(cut) + 1)]
        assert kept >= max(n for n, end in enumerate(ends) if end <= len(shown.encode())) - 3
        if len(shown.encode()) in ends:
            assert tokens == made[: ends.index(len(shown.encode()))]


def test_a_token_that_is_no_whole_character_stays_if_that_was_shown() -> None:
    pieces = Pieces([b"a\xf0\x9f", b"b."])
    for made in ([b"a", b"\xb0", b"b."], [b"a\xf0\x9f", b"b."], [b"\xc3", b"b."]):
        shown, tokens, _ = held(pieces.tokenizer, pieces.ids("p"), pieces.ids(*made), stop=("b",))
        assert (shown[-1], tokens) == ("\ufffd", pieces.ids(*made[:-1]))
        shown, tokens, _ = held(pieces.tokenizer, pieces.ids("p"), pieces.ids(*made), stop=(".",))
        assert (shown[-2:], tokens) == ("\ufffdb", pieces.ids(*made[:-1], "b"))


@pytest.mark.parametrize("count", RANDOM_TEXTS)
def test_random_texts_are_held_as_they_were_shown(count: int) -> None:
    draw = random.Random(5)
    letters = ["a", "b", "é", "😀", "\n", " "]
    for _ in range(count):
        text = "".join(draw.choices(letters, k=12)).encode()
        at = sorted(draw.sample(range(1, len(text)), draw.randint(0, 8)))
        cut = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
        pieces = Pieces(cut)
        begin = draw.randrange(12)
        stop = text.decode()[begin : begin + draw.randint(1, 3)]
        shown, tokens, _ = held(pieces.tokenizer, pieces.ids(*"p "), pieces.ids(*cut), stop=(stop,))
        assert pieces.tokenizer.decode(tokens) == shown
        assert shown == text.decode()[: text.decode().find(stop)]


def test_hidden_special_tokens_before_the_stop_string_are_held() -> None:
    pieces = Pieces([b"Hi", b"you."], special=["<|x|>", "<|end|>"])
    made = pieces.ids("Hi", "<|x|>", "you.", "<|end|>")
    before = pieces.ids("p")
    assert held(pieces.tokenizer, before, made, stop=("<|end|>",))[1] == made[:3]
    assert held(pieces.tokenizer, before, made, stop=(".",))[1] == [*made[:2], *pieces.ids(*"you")]
    assert held(pieces.tokenizer, before, made, stop=("<|x",))[1] == made[:1]


def test_a_special_token_is_held_where_it_was_shown() -> None:
    pieces = Pieces([b"Hi"], special=["<|end|>"])
    made, before = pieces.ids("Hi", "<|end|>"), pieces.ids("p")
    for skip in (True, False):
        more = {"include_stop_string": True, "skip_special_tokens": skip}
        shown, tokens, _ = held(pieces.tokenizer, before, made, stop=("<|end|>",), **more)
        assert (shown, tokens) == ("Hi<|end|>", made)
        shown, tokens, _ = held(pieces.tokenizer, before, made, stop=("<|e",), **more)
        assert (shown, tokens) == ("Hi<|e", [*made[:1], *pieces.ids(*"<|e")])


@pytest.mark.parametrize(
    ("made", "stop", "pieces"),
    [
        (["▁red", "▁green"], "reen", ["▁red", "▁g"]),
        (["▁red", "▁green"], "n", ["▁red", "▁gree"]),
        (["▁red", "green"], "een", ["▁red", "gr"]),
        (["red", "green"], "een", ["red", "gr"]),
        (["▁red", "▁green"], "d", ["▁re"]),
        (["red", "▁green"], "d", ["re"]),
        (["▁red", "<0x0A>", "green"], "\n", ["▁red"]),
        (
            ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "red"],
            "ed",
            ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "r"],
        ),
        (["<0xF0>", "a", "red"], "ed", ["<0xF0>", "a", "r"]),
    ],
)
@pytest.mark.parametrize("prompt", ["", "a b", "a b\n"])
def test_what_is_made_anew_of_a_sentencepiece_text_brings_no_space(
    prompt: str, made: list[str], stop: str, pieces: list[str]
) -> None:
    backend = llama2_tokenizer(["▁red", "▁green", "red", "green"])
    tokenizer = Tokenizer(backend)
    before = tokenizer.encode(prompt) if prompt else []
    ids = [backend.convert_tokens_to_ids(piece) for piece in made]
    shown, tokens, _ = held(tokenizer, before, ids, stop=(stop,))
    if tokenizer.decode([*before, *ids]).startswith(tokenizer.decode(before)):
        assert tokenizer.decode([*before, *tokens]) == tokenizer.decode(before) + shown
    if prompt == "a b":  # elsewhere several tokens make the same text
        assert backend.convert_ids_to_tokens(tokens) == pieces


@pytest.mark.parametrize("skip", [True, False])
def test_the_name_of_a_special_token_that_was_spelled_out_is_held_as_letters(skip: bool) -> None:
    pieces = Pieces([b"<|end|>."], special=["<|end|>"])
    made = pieces.ids("a", "<|end|>.")
    shown, tokens, _ = held(
        pieces.tokenizer, pieces.ids("p"), made, stop=(".",), skip_special_tokens=skip
    )
    assert shown == "a<|end|>"
    assert tokens == pieces.ids(*"a<|end|>")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", ["<think>.", "a<think>b.", "<think><think>."])
def test_what_is_made_anew_holds_no_token_that_the_model_lacks(text: str, special: bool) -> None:
    """Tokens were added to the tokenizer, and not to the model."""
    pieces = Pieces([text.encode()])
    vocabulary = 257  # with that one piece
    backend = pieces.tokenizer.fast.backend_tokenizer
    backend.add_tokens([AddedToken("<think>", special=special, normalized=False)])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert max(tokenizer.encode(text)) >= vocabulary
    shown, tokens, _ = held(
        tokenizer, pieces.ids("p"), pieces.ids("x", text), vocabulary=vocabulary, stop=(".",)
    )
    assert shown == "x" + text.removesuffix(".")
    assert tokens == pieces.ids(*shown)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("cut", ["zzz", "apitalzzz", "lzzz"])
@pytest.mark.parametrize("prompt", ["the", "the\N{GRINNING FACE}"])
def test_a_special_token_that_was_drawn_stays_that_token(prompt: str, cut: str, skip: bool) -> None:
    """Even where the completion changes the text before it, so that no split gives what was
    shown."""
    tokenizer = Tokenizer(KINDS["gemma"]())
    stray, special = tokenizer.fast.convert_tokens_to_ids(["<0xE4>", "<s>"])
    before = tokenizer.encode(prompt, special_tokens=False)
    text = tokenizer.encode("the capitalzzz", special_tokens=False)
    made = [stray, special, *text]
    shown, tokens, _ = held(tokenizer, before, made, stop=(cut,), skip_special_tokens=skip)
    assert shown == f"\ufffd{'' if skip else '<s>'}" + "the capitalzzz".removesuffix(cut)
    assert tokens[:2] == [stray, special]
    assert tokenizer.decode(tokens[2:]) == "the capitalzzz".removesuffix(cut)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("end", ["\xa9", "\xff", "a", "<|end|>"])
def test_an_end_token_after_half_a_character_is_not_held(end: str, include: bool) -> None:
    """The stop string is the half character, which shows as U+FFFD only once nothing follows."""
    pieces = Pieces(special=["<|end|>"])
    (token,) = pieces.ids(end if end == "<|end|>" else end.encode("latin-1"))
    for skip in (True, False):
        shown, tokens, _ = held(
            pieces.tokenizer,
            pieces.ids("p"),
            [*pieces.ids("x", b"\xc3"), token],
            stop=("\ufffd",),
            stop_token_ids=frozenset({token}),
            include_stop_string=include,
            skip_special_tokens=skip,
        )
        assert shown == ("x\ufffd" if include else "x")
        assert tokens == (pieces.ids("x", b"\xc3") if include else pieces.ids("x"))


@pytest.mark.parametrize("length", [10, 200])
def test_few_splits_are_tried_however_long_a_completion_is(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of byte tokens that goes on from the prompt's changes the prompt's own text, so no
    split seems to fit; and one that is all wrong has its text after its last token."""
    backend = llama2_tokenizer(["▁red", "▁green"])
    tokenizer, ids = Tokenizer(backend), backend.convert_tokens_to_ids
    decode, decoded = tokenizer.decode, 0

    def counted(*args: object, **more: object) -> str:
        nonlocal decoded
        decoded += 1
        return decode(*args, **more)

    monkeypatch.setattr(tokenizer, "decode", counted)
    letters = [ids("<0xF0>"), *[ids("a"), ids("b")] * length, ids("▁green")]
    shown, tokens, _ = held(
        tokenizer, tokenizer.encode("a é"), letters, stop=("reen",), max_tokens=900
    )
    assert shown == "\ufffd" + "ab" * length + " g"
    if length > MAX_SPLITS:
        assert tokens == [*letters[:-1], *tokenizer.encode("g")]
    run = [*[ids("<0xF0>")] * length, ids("▁green")]
    shown, tokens, _ = held(tokenizer, [ids("a")], run, stop=("\ufffd\ufffd",), max_tokens=900)
    assert (shown, tokens) == ("", [])
    faces = [*[ids(f"<0x{byte:02X}>") for byte in "😀".encode()] * length, ids("▁red")]
    shown, tokens, _ = held(tokenizer, [ids("a")], faces, stop=("😀" * 9 + " r",), max_tokens=900)
    assert (shown, tokens) == ("😀" * (length - 9), faces[: 4 * (length - 9)])
    assert decoded <= 3 * (MAX_SPLITS + 6)


def test_what_cannot_be_split_back_into_the_same_text_is_held_as_its_nearest() -> None:
    """A tokenizer that lowers its input has no tokens for capitals that a token has."""
    from tokenizers import normalizers  # noqa: PLC0415

    pieces = Pieces([b"ABC"])
    pieces.tokenizer.fast.backend_tokenizer.normalizer = normalizers.Lowercase()
    shown, tokens, _ = held(pieces.tokenizer, [], pieces.ids("x", "ABC"), stop=("C",))
    assert (shown, pieces.tokenizer.decode(tokens)) == ("xAB", "xab")


def test_a_completion_that_changes_the_text_before_it_is_held_in_few_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = Tokenizer(KINDS["gemma"]())
    stray = tokenizer.fast.backend_tokenizer.token_to_id("<0xE4>")
    before = tokenizer.encode("the\N{GRINNING FACE}", special_tokens=False)
    made = [stray, *tokenizer.encode("the capital" * 100 + "zzz", special_tokens=False)]
    decodes: list[int] = []
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: Sequence[int], **settings: bool) -> str:
        decodes.append(len(ids))
        return decode(self, ids, **settings)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    shown, tokens, _ = held(tokenizer, before, made, stop=("zzz",), max_tokens=1000)
    assert len(decodes) < 80
    assert shown == "\ufffd" + "the capital" * 100
    assert decode(tokenizer, tokens) == shown
