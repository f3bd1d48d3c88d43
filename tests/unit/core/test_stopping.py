"""When a completion ends, and what of its text is shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from griffin_core.errors import InvalidRequest
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import FinishReason, StopChecker, StoppingParams
from griffin_core.text.tokenizer import Tokenizer
from tests.unit.core.pieces import Pieces, chunkings, parts

EOS = 257


@pytest.fixture
def check(tiny: Callable[[str], Model]) -> Callable[..., tuple[list[str], FinishReason | None]]:
    """Feeds a text byte by byte (a token each) and returns pieces shown and the reason."""
    tokenizer = tiny("llama").tokenizer

    def run(
        text: str, *more_tokens: int, room: int = 1000, **params: object
    ) -> tuple[list[str], FinishReason | None]:
        checker = StopChecker(
            StoppingParams(**params), tokenizer, frozenset([EOS]), before=(), room=room
        )
        pieces, reason = [], None
        for token in (*tokenizer.encode(text), *more_tokens):
            assert reason is None, "fed beyond the end"
            piece, reason = checker.push(token)
            pieces.append(piece)
        return pieces, reason

    return run


Check = Callable[..., tuple[list[str], FinishReason | None]]


def test_text_comes_out_as_it_goes_in(check: Check) -> None:
    assert check("abc") == (["a", "b", "c"], None)


def test_eos_ends_and_shows_nothing(check: Check) -> None:
    assert check("ab", EOS) == (["a", "b", ""], FinishReason.EOS)


def test_eos_can_be_ignored(check: Check) -> None:
    pieces, reason = check("ab", EOS, ignore_eos=True)
    assert ("".join(pieces), reason) == ("ab", None)


def test_a_stop_token_ends_like_eos_even_if_eos_is_ignored(check: Check) -> None:
    pieces, reason = check("ab", 7, ignore_eos=True, stop_token_ids=frozenset([7]))
    assert ("".join(pieces), reason) == ("ab", FinishReason.EOS)


def test_a_stop_string_over_several_tokens_is_never_shown(check: Check) -> None:
    pieces, reason = check("one END", stop=("END",))
    assert "".join(pieces) == "one "
    assert reason is FinishReason.STOP_SEQUENCE


def test_held_text_is_shown_once_it_is_no_stop_string(check: Check) -> None:
    assert check("aENb", stop=("END",)) == (["a", "", "", "ENb"], None)


def test_overlapping_beginnings_are_followed(check: Check) -> None:
    pieces, reason = check("aabaab!", stop=("aab!",))
    assert "".join(pieces) == "aab"
    assert reason is FinishReason.STOP_SEQUENCE


def test_of_two_stop_strings_the_first_in_the_text_ends(check: Check) -> None:
    pieces, reason = check("a, ", stop=(" b", ", "))
    assert ("".join(pieces), reason) == ("a", FinishReason.STOP_SEQUENCE)


def test_max_tokens_shows_what_was_held(check: Check) -> None:
    pieces, reason = check("abEN", stop=("END",), max_tokens=4)
    assert ("".join(pieces), reason) == ("abEN", FinishReason.MAX_TOKENS)


def test_the_context_length_ends_it(check: Check) -> None:
    assert check("abc", room=3)[1] is FinishReason.CONTEXT_LENGTH


def test_a_character_cut_short_at_the_end_shows_as_a_replacement(
    check: Check, tiny: Callable[[str], Model]
) -> None:
    first_byte_of_e_acute = tiny("llama").tokenizer.encode("é")[0]
    pieces, reason = check("a", first_byte_of_e_acute, max_tokens=2)
    assert (pieces, reason) == (["a", "\ufffd"], FinishReason.MAX_TOKENS)


# -- where tokens end ----------------------------------------------------------------------------

RANDOM_TEXTS = [200, pytest.param(20_000, marks=pytest.mark.slow)]


def run(
    tokenizer: Tokenizer, tokens: Sequence[int], **params: object
) -> tuple[str, FinishReason | None, str]:
    """The text that is shown, why it ends, and the stop string."""
    checker = StopChecker(StoppingParams(**params), tokenizer, frozenset(), before=(), room=1000)
    shown = ""
    for token in tokens:
        text, reason = checker.push(token)
        shown += text
        if reason is not None:
            return shown, reason, checker.matched
    return shown, None, checker.matched


def by_the_letter(text: str, stops: Sequence[str]) -> tuple[str, str] | None:
    """What is shown and which stop string ends a text that comes letter by letter."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return None


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stop"),
    [
        ("xabcd!", ("ab", "abc"), "x", "ab"),
        ("xabcd!", ("abc", "ab"), "x", "ab"),
        ("xabcd!", ("abcd", "bc"), "xa", "bc"),
        ("xabcd!", ("cd", "abcd", "d"), "x", "abcd"),
        ("one\n\nA:", ("\nA:", "\n\n"), "one", "\n\n"),
        ("aé€😀b", ("😀", "€x"), "aé€", "😀"),
    ],
)
@pytest.mark.parametrize("include", [False, True])
def test_which_stop_string_ends_a_text_does_not_depend_on_where_tokens_end(
    text: str, stops: tuple[str, ...], shown: str, stop: str, include: bool
) -> None:
    pieces = Pieces(parts(text.encode()))
    expected = (shown + stop * include, FinishReason.STOP_SEQUENCE, stop)
    for cut in chunkings(text.encode()):
        made = run(pieces.tokenizer, pieces.ids(*cut), stop=stops, include_stop_string=include)
        assert made == expected, cut


@pytest.mark.parametrize("count", RANDOM_TEXTS)
def test_random_texts_end_as_if_they_came_letter_by_letter(count: int) -> None:
    draw = random.Random(4)
    pieces = Pieces(bytes(p) for n in range(2, 5) for p in _words(n))
    for _ in range(count):
        stops = [
            "".join(draw.choices("ab", k=draw.randint(1, 6))) for _ in range(draw.randint(1, 4))
        ]
        text, cut = "", []
        while len(text) < 24:
            cut.append("".join(draw.choices("abc", weights=[5, 5, 1], k=draw.randint(1, 4))))
            text += cut[-1]
        made = run(pieces.tokenizer, pieces.ids(*cut), stop=tuple(stops), max_tokens=len(cut))
        expected = by_the_letter(text, stops)
        if expected is None:
            assert made == (text, FinishReason.MAX_TOKENS, "")
        else:
            assert made == (expected[0], FinishReason.STOP_SEQUENCE, expected[1])


def _words(size: int) -> list[bytes]:
    words = [b""]
    for _ in range(size):
        words = [word + letter for word in words for letter in (b"a", b"b", b"c")]
    return words


# -- special tokens, and the least tokens --------------------------------------------------------


@pytest.fixture(scope="module")
def chat() -> Pieces:
    return Pieces([b"Hi", b"!\n", b" there"], special=["<|im_end|>", "<|x|>"])


def test_a_special_token_ends_as_a_stop_string_and_is_not_shown(chat: Pieces) -> None:
    ids = chat.ids("Hi", "<|x|>", " there", "<|im_end|>", "Hi")
    for stop in ("<|im_end|>", "|im_", " there<|im", "<"):
        shown, reason, matched = run(chat.tokenizer, ids, stop=(stop,))
        assert (reason, matched) == (FinishReason.STOP_SEQUENCE, stop)
        assert shown == {" there<|im": "Hi", "<": "Hi"}.get(stop, "Hi there")


def test_special_tokens_are_shown_if_asked_for(chat: Pieces) -> None:
    ids = chat.ids("Hi", "<|x|>", " there", "<|im_end|>", "Hi")
    assert run(chat.tokenizer, ids)[0] == "Hi thereHi"
    assert run(chat.tokenizer, ids, skip_special_tokens=False)[0] == "Hi<|x|> there<|im_end|>Hi"
    stopped = run(chat.tokenizer, ids, skip_special_tokens=False, stop=("im_end",))
    assert stopped[0] == "Hi<|x|> there<|"


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_is_included_even_if_it_is_a_special_token(chat: Pieces, skip: bool) -> None:
    ids = chat.ids("Hi", "<|im_end|>", "Hi")
    more = {"include_stop_string": True, "skip_special_tokens": skip}
    assert run(chat.tokenizer, ids, stop=("<|im_end|>",), **more)[0] == "Hi<|im_end|>"
    assert run(chat.tokenizer, ids, stop=("i<|im",), **more)[0] == "Hi<|im"


def test_a_special_token_between_the_bytes_of_a_character_disturbs_neither(chat: Pieces) -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    ids = chat.ids("Hi", first, "<|x|>", second, "Hi")
    shown, reason, _ = run(chat.tokenizer, ids, max_tokens=5)
    assert (shown, reason) == ("HiéHi", FinishReason.MAX_TOKENS)


def test_a_stop_string_counts_once_it_ends_after_the_least_tokens(check: Check) -> None:
    assert check("a.b.", stop=(".",), min_tokens=2)[0] == ["a", ".", "b", ""]
    assert check("a.", stop=(".",), min_tokens=1)[0] == ["a", ""]
    pieces, reason = check("a\n\n", stop=("\n\n",), min_tokens=2)
    assert ("".join(pieces), reason) == ("a", FinishReason.STOP_SEQUENCE)
    pieces, reason = check("a\n\n", stop=("\n\n",), min_tokens=3, max_tokens=3)
    assert ("".join(pieces), reason) == ("a\n\n", FinishReason.MAX_TOKENS)
    pieces, reason = check("aaa", stop=("aa",), min_tokens=2)
    assert ("".join(pieces), reason) == ("a", FinishReason.STOP_SEQUENCE)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"max_tokens": 0}, "stopping.max_tokens"),
        ({"min_tokens": -1}, "stopping.min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "stopping.min_tokens"),
        ({"stop": ("x",) * 300}, "stopping.stop"),
        ({"stop": ("ok", "")}, "stopping.stop[1]"),
        ({"stop": ("x" * 257,)}, "stopping.stop[0]"),
        ({"stop_token_ids": frozenset(range(65))}, "stopping.stop_token_ids"),
    ],
)
def test_values_out_of_range_are_refused(params: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StoppingParams(**params)
    assert caught.value.field == field
