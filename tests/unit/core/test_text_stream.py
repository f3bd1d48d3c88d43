"""TextStream: whatever a model draws, the pieces are what decoding all of it at once adds."""

from __future__ import annotations

import random
import time
from copy import copy

import pytest
from transformers import PreTrainedTokenizerFast

from griffin_core.text.stream import WINDOW_TOKENS, TextStream
from griffin_core.text.tokenizer import Tokenizer
from tests.tokenizer_kinds import BYTES, KINDS

SEQUENCES = 60
SEQUENCES_SLOW = 5_000
"""Random token sequences of each kind, each cut at every place."""

PADDING = 8
"""Ids that a model's vocabulary has and its tokenizer does not."""

TEXTS = ("é", "漢字", "😀", "👩‍👧", "\n", "\ufffd", " ", "  ", "the", " Paris", "สวัสดี", "a b")


class Kind:
    """One kind of tokenizer, and random tokens of it.

    Args:
        name: of ``KINDS``.
    """

    def __init__(self, name: str) -> None:
        self.theirs: PreTrainedTokenizerFast = KINDS[name]()
        self.ours = Tokenizer(self.theirs)
        vocabulary = self.theirs.get_vocab()
        self.size = len(vocabulary)
        self.byte_ids = [vocabulary[token] for token in BYTES if token in vocabulary]
        self._odd = [*self.theirs.all_special_ids, self.size, self.size + PADDING - 1]
        self._texts = [self.encode(text) for text in TEXTS]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.theirs(text, add_special_tokens=False).input_ids
        return ids

    def decode(self, ids: list[int], skip: bool) -> str:
        text: str = self.theirs.backend_tokenizer.decode(ids, skip_special_tokens=skip)
        return text

    def draw(self, rng: random.Random, most: int) -> list[int]:
        """Tokens of every sort: any at all, texts, the bytes of characters in part, special ones,
        ones that the tokenizer does not know."""
        ids: list[int] = []
        while len(ids) < most:
            match rng.randrange(5):
                case 0:
                    ids.append(rng.randrange(self.size + PADDING))
                case 1:
                    ids.append(rng.choice(self._odd))
                case 2:
                    ids += rng.choice(self._texts)
                case 3:
                    part = rng.choice(self._texts) + rng.choice(self._texts)
                    ids += part[rng.randrange(len(part)) :][: rng.randrange(1, 6)]
                case _:
                    ids += rng.choices(self.byte_ids or range(256), k=rng.randrange(1, 4))
        return ids[:most]

    def added(self, before: list[int], ids: list[int], *, skip: bool = True) -> str:
        """What ``ids`` add to the text of ``before``, by decoding both at once."""
        base, whole = self.decode(before, skip), self.decode(before + ids, skip)
        same = next(n for n in range(len(base), -1, -1) if whole.startswith(base[:n]))
        spoilt = "\ufffd" * len(base[same:].encode())
        return whole[same:].removeprefix(spoilt)


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


def join(stream: TextStream, ids: list[int]) -> str:
    return "".join(map(stream.push, ids)) + stream.flush()


@pytest.mark.parametrize(
    "sequences",
    [SEQUENCES, pytest.param(SEQUENCES_SLOW, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
@pytest.mark.parametrize("skip", [True, False], ids=["special-left-out", "special-shown"])
def test_pieces_join_to_what_the_whole_adds_wherever_it_is_cut(
    kind: Kind, skip: bool, sequences: int
) -> None:
    rng = random.Random(0)
    for _ in range(sequences):
        before = kind.draw(rng, rng.randrange(12))
        ids = kind.draw(rng, rng.randrange(1, 3 * WINDOW_TOKENS))
        stream = kind.ours.stream(before, skip_special_tokens=skip)
        given = ""
        for end, token in enumerate(ids, 1):
            given += stream.push(token)
            ended = copy(stream)  # one that is cut here
            whole = kind.added(before, ids[:end], skip=skip)
            assert given + ended.flush() == whole, (before, ids[:end])
            assert ended.flush() == ""
        text = kind.theirs.decode(before + ids, skip_special_tokens=skip)
        assert kind.decode(before + ids, skip) == text


def test_what_a_prompt_ends_with_is_not_given_again(kind: Kind) -> None:
    """A completion's text is the slice of the whole's, where the prompt's text stays as it is."""
    rng, compared = random.Random(1), 0
    for _ in range(SEQUENCES):
        before, ids = kind.draw(rng, 12), kind.draw(rng, 12)
        base, whole = kind.decode(before, True), kind.decode(before + ids, True)
        if whole.startswith(base):
            assert join(kind.ours.stream(before), ids) == whole[len(base) :]
            compared += 1
    assert compared > SEQUENCES / 3


def test_only_the_end_of_a_long_prompt_is_looked_at(kind: Kind) -> None:
    rng = random.Random(2)
    for _ in range(SEQUENCES // 4):
        before, ids = kind.draw(rng, 400), kind.draw(rng, 12)
        assert join(kind.ours.stream(before), ids) == kind.added(before, ids)


def test_a_character_that_a_prompt_begins_is_given_whole(kind: Kind) -> None:
    emoji = kind.encode("a😀")
    assert join(kind.ours.stream(emoji[:-2]), [*emoji[-2:], *kind.encode("b")]).startswith("😀")


def test_a_completion_that_spoils_the_prompts_last_bytes_does_not_repeat_them(kind: Kind) -> None:
    stray, letter = kind.encode("😀")[-1:], kind.encode("a")[-1:]
    for prompt in ("a\n", "the 👏", "漢字!", "a\n\n\n"):
        assert join(kind.ours.stream(kind.encode(prompt)), [*stray, *letter]) == "\ufffda"


def test_the_first_blank_of_a_completion_is_given(kind: Kind) -> None:
    ids = kind.encode("the capital of France is Paris")
    for end in range(1, len(ids)):
        before = kind.decode(ids[:end], True)
        text = join(kind.ours.stream(ids[:end]), ids[end:])
        assert before + text == "the capital of France is Paris"


def test_a_stray_byte_does_not_take_back_what_was_given(kind: Kind) -> None:
    rng = random.Random(3)
    emoji, newline, letter = kind.encode("😀"), kind.encode("\n"), kind.encode("a")
    for ids in (
        [*newline, emoji[0], *letter],
        [*kind.encode("Paris"), *newline, emoji[-1], *kind.encode(" is")],
        [*emoji, *emoji[:-1], *letter, *emoji],
        [*emoji[1:], *newline * 3, *letter],
        [*kind.encode("漢字"), rng.choice(kind.byte_ids or [0x80])],
    ):
        assert join(kind.ours.stream(), ids) == kind.decode(ids, True)


def test_whole_characters_come_as_soon_as_the_next_token_cannot_change_them(kind: Kind) -> None:
    stream = kind.ours.stream()
    pieces = [stream.push(token) for token in kind.encode("the é\nis 😀 a")]
    assert "".join(pieces) == "the é\nis 😀 a"
    assert "\ufffd" not in "".join(pieces)
    stream = kind.ours.stream()
    ids = kind.encode("a b c d e f g h i")
    text = ""
    for end, token in enumerate(ids, 1):  # nothing is held back of ordinary tokens
        text += stream.push(token)
        assert text == kind.decode(ids[:end], True)


def test_special_tokens_do_not_end_a_character_unless_they_are_shown(kind: Kind) -> None:
    emoji = kind.encode("😀")
    eos = kind.theirs.eos_token_id
    ids = [*emoji[:2], eos, kind.size + 1, *emoji[2:], *kind.encode("a")]
    text = join(kind.ours.stream(), ids)
    assert text == kind.decode(ids, True)
    assert text.startswith("😀")
    shown = join(kind.ours.stream(skip_special_tokens=False), ids)
    assert kind.theirs.eos_token in shown
    assert shown == kind.decode(ids, False)


def test_ids_that_the_tokenizer_does_not_know_have_no_text(kind: Kind) -> None:
    unknown = [kind.size, kind.size + PADDING - 1]
    for skip in (True, False):
        assert join(kind.ours.stream(unknown, skip_special_tokens=skip), unknown) == ""
    assert kind.ours.decode(unknown) == kind.ours.decode_one(unknown[0]) == ""


def test_a_stream_takes_as_long_for_each_token_however_many_came_before(kind: Kind) -> None:
    """A run of byte tokens, which is decoded when it ends, included."""
    run = kind.encode("😀" * 500)
    for ids in (kind.encode("the capital of Paris ") * 250, [*run, *kind.encode("a")] * 2):
        stream = kind.ours.stream()
        begun = time.perf_counter()
        text = join(stream, ids)
        assert (time.perf_counter() - begun) / len(ids) < 200e-6
        assert text == kind.decode(ids, True)
