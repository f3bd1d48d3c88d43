"""Which tokens a completion may not draw: bad words, and its end before the least tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from griffin_core.errors import InvalidRequest
from griffin_core.model.load import Model
from griffin_core.sampling.bad_words import bad_words_ids
from griffin_core.sampling.bans import Bans
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.text.tokenizer import Tokenizer
from tests.unit.core.pieces import Pieces, llama2_tokenizer

EOS = frozenset([8, 9])


def bans(
    *words: tuple[int, ...], allowed: frozenset[int] = frozenset(), **stopping: object
) -> Bans:
    sampling = SamplingParams(bad_words_ids=words, allowed_token_ids=allowed)
    return Bans(sampling, StoppingParams(**stopping), EOS, vocab_size=10)


def test_nothing_is_banned_unless_asked_for() -> None:
    assert bans().at(0, ()) == frozenset()
    assert bans().lookback == 0


def test_a_word_of_one_token_is_banned_everywhere() -> None:
    some = bans((3,), (5,))
    assert some.at(0, ()) == some.at(70, (1, 2)) == {3, 5}
    assert some.lookback == 0


def test_the_last_token_of_a_word_is_banned_behind_the_others() -> None:
    some = bans((1, 2, 3), (2, 4), (2, 5), (1, 1))
    assert some.lookback == 2
    assert some.at(0, ()) == frozenset()
    assert some.at(1, (2,)) == {4, 5}
    assert some.at(2, (1, 2)) == {3, 4, 5}
    assert some.at(3, (0, 1)) == {1}
    assert some.at(3, (2, 0)) == frozenset()


def test_no_token_that_ends_a_completion_comes_before_the_least_tokens() -> None:
    for ignore_eos in (False, True):
        some = bans(min_tokens=2, stop_token_ids=frozenset([1]), ignore_eos=ignore_eos)
        assert [some.at(place, ()) for place in range(3)] == [{1, 8, 9}, {1, 8, 9}, set()]


def test_tokens_that_the_model_cannot_draw_need_no_ban() -> None:
    some = bans((3, 10), (11,), (4,))
    assert (some.at(0, ()), some.lookback) == ({4}, 0)


@pytest.mark.parametrize(
    ("words", "more", "field"),
    [
        ([(3,), (4,)], {"allowed": frozenset([3, 4])}, "sampling.allowed_token_ids"),
        ([(3,)], {"allowed": frozenset([3, 8]), "min_tokens": 1}, "sampling.allowed_token_ids"),
        ([], {"allowed": frozenset([9]), "min_tokens": 1}, "sampling.allowed_token_ids"),
        ([(token,) for token in range(10)], {}, "sampling.bad_words"),
        ([(token,) for token in range(8)], {"min_tokens": 3}, "sampling.bad_words"),
    ],
)
def test_a_request_that_bans_every_token_is_refused(
    words: list[tuple[int, ...]], more: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest, match="no token left to draw") as caught:
        bans(*words, **more)
    assert caught.value.field == field


def test_a_place_where_nothing_is_left_is_refused() -> None:
    some = bans((3, 3), allowed=frozenset([3]))
    assert some.at(0, ()) == frozenset()
    with pytest.raises(InvalidRequest, match="after 1 tokens of the completion"):
        some.at(1, (3,))


# -- from words to tokens ------------------------------------------------------------------------


def tokens(backend: Tokenizer, *words: str) -> list[list[str]]:
    sequences = bad_words_ids(words, backend)
    return [backend.fast.convert_ids_to_tokens(list(ids)) for ids in sequences]


def test_words_are_banned_at_the_beginning_and_after_other_text() -> None:
    sentencepiece = Tokenizer(llama2_tokenizer(["▁bad", "bad"]))
    assert sorted(tokens(sentencepiece, "bad")) == [["bad"], ["▁bad"]]
    byte_level = Pieces().tokenizer
    assert tokens(byte_level, "bad") == [["b", "a", "d"]]  # " bad" ends in it


def test_words_are_banned_in_both_forms_where_the_space_is_part_of_the_token(
    smollm2: Model,
) -> None:
    made = tokens(smollm2.tokenizer, "Paris", " London", "\n")
    assert sorted(made) == sorted([["Paris"], ["ĠParis"], ["ĠLondon"], ["Ċ"], ["ĠĊ"]])


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["x"] * 65, "sampling.bad_words"),
        (["ok", ""], "sampling.bad_words[1]"),
        (["x" * 257], "sampling.bad_words[0]"),
    ],
)
def test_words_out_of_range_are_refused(
    words: list[str], field: str, tiny: Callable[[str], Model]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bad_words_ids(words, tiny("llama").tokenizer)
    assert caught.value.field == field


def test_a_word_that_the_tokenizer_drops_is_refused() -> None:
    from tokenizers import normalizers  # noqa: PLC0415

    pieces = Pieces()
    pieces.tokenizer.fast.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("x", ""), normalizers.Strip()]
    )
    with pytest.raises(InvalidRequest, match=r"bad_words\[0\]: got x"):
        bad_words_ids(["x"], pieces.tokenizer)
