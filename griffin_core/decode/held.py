"""What a kept session holds of a completion that a stop string cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, takewhile

from griffin_core.model.tokenizer import Tokenizer
from griffin_core.sampling.stopping import StopChecker

MOST_TRIED = 32
"""Splits that are tried: each decodes all tokens, while the engine's other sessions wait. A cut is
further back only in a long run of byte tokens, or where the text before a completion changed."""


def held_after_stop(
    tokenizer: Tokenizer,
    before: Sequence[int],
    made: Sequence[int],
    checker: StopChecker,
    *,
    skip_special_tokens: bool,
) -> tuple[int, list[int]]:
    """The tokens whose text is what the completion has shown.

    Args:
        before: the tokens before the completion.
        made: the completion.
        checker: has followed it to its stop string.
        skip_special_tokens: whether the shown text leaves special tokens out.

    Returns:
        How many of the completion's first tokens stay, and the tokens that take the place of one
        that only begins before the cut.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([*before, *ids], skip_special_tokens=skip_special_tokens)

    prompt = len(decode(()))
    splits = checker.splits()
    nearest = list(islice(splits, MOST_TRIED))
    for split in nearest:
        kept = made[: split.tokens]
        # Of tokens that end inside a character nothing is shown before others come; they stay only
        # if what they decode to by then is what was shown.
        late = decode(kept)[prompt + split.characters :] if kept else ""
        if split.rest.startswith(late):
            rest = split.rest.removeprefix(late)
            return len(kept), _tokens_of(rest, tokenizer, decode, kept)
    # Of those with the most characters, the one with the fewest tokens: its last one brought text.
    most = nearest[0].characters
    alike = [*nearest, *takewhile(lambda split: split.characters == most, splits)]
    whole = next(split for split in reversed(alike) if split.characters == most)
    kept = made[: whole.tokens]
    return len(kept), _tokens_of(whole.rest, tokenizer, decode, kept)


def _tokens_of(
    rest: str, tokenizer: Tokenizer, decode: Callable[[Sequence[int]], str], kept: Sequence[int]
) -> list[int]:
    if not rest:
        return []
    wanted = decode(kept) + rest
    alone = tokenizer.encode(rest, special_tokens=False)
    for ids in (alone, tokenizer.encode_inner(rest)):
        if not _special(ids, tokenizer) and decode([*kept, *ids]) == wanted:
            return ids
    if _special(alone, tokenizer):  # the text spells a special token's name, and is not that token
        return [token for letter in rest for token in _tokens_of_letter(letter, tokenizer)]
    return alone  # a tokenizer that normalizes text has no tokens for it


def _special(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    return any(tokenizer.special_text(token) is not None for token in ids)


def _tokens_of_letter(letter: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_inner(letter) or tokenizer.encode(letter, special_tokens=False)
