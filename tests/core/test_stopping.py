"""When a completion ends, and what of its text is shown."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from griffin_core.errors import InvalidRequest
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import FinishReason, StopChecker, StoppingParams

EOS = 257


@pytest.fixture
def check(tiny: Callable[[str], Model]) -> Callable[..., tuple[list[str], FinishReason | None]]:
    """Feeds a text byte by byte (a token each) and returns pieces shown and the reason."""
    tokenizer = tiny("llama").tokenizer

    def run(
        text: str, *more_tokens: int, room: int = 1000, **params: object
    ) -> tuple[list[str], FinishReason | None]:
        checker = StopChecker(
            StoppingParams(**params),
            tokenizer.stream(),
            frozenset([EOS]),
            room,
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


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"max_tokens": 0}, "stopping.max_tokens"),
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
