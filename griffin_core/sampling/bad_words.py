"""Converts words that a completion must not contain to the token sequences that spell them."""

from __future__ import annotations

from collections.abc import Sequence

from griffin_core.errors import InvalidRequest
from griffin_core.text.tokenizer import Tokenizer

MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARACTERS = 256


def bad_words_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Returns the token sequences of each word: alone and after a space (vLLM bans these two), and
    after a line break, which is how a sentencepiece tokenizer splits a word without a space before
    it. A sequence that ends in a shorter banned one is left out, since the shorter one prevents it.

    Other tokens for the same text, such as single letters, stay allowed.

    Raises:
        InvalidRequest: there are too many words, or a word is empty, too long or has no tokens.
    """
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            "sampling.bad_words", f"{len(words)} words", f"at most {MAX_BAD_WORDS}"
        )
    found: set[tuple[int, ...]] = set()
    for index, word in enumerate(words):
        if not 1 <= len(word) <= MAX_BAD_WORD_CHARACTERS:
            raise InvalidRequest(
                f"sampling.bad_words[{index}]",
                f"{len(word)} characters",
                f"1 to {MAX_BAD_WORD_CHARACTERS} characters",
            )
        spaced = tokenizer.encode(f" {word}", special_tokens=False)
        alone = tokenizer.encode(word, special_tokens=False)
        inner = tokenizer.encode_inner(word)
        sequences = {tuple(alone), tuple(spaced), tuple(inner)} - {()}
        if not sequences:
            raise InvalidRequest(
                f"sampling.bad_words[{index}]", word, "text that the tokenizer has tokens for"
            )
        found |= sequences
    return tuple(sorted(s for s in found if not any(_ends_in(s, other) for other in found)))


def _ends_in(sequence: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(other) < len(sequence) and sequence[-len(other) :] == other
