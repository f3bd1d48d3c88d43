"""Which tokens a kept session holds after a stop string has cut its completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, takewhile

from griffin_core.sampling.stopping import StopChecker
from griffin_core.text.tokenizer import Tokenizer

MAX_SPLITS = 32
"""Most splits that are tried: each decodes all tokens, while the engine's other sessions wait. A
cut is further back only in a long run of byte tokens, or where the text before a completion
changed."""


def tokens_after_stop(
    tokenizer: Tokenizer,
    before: Sequence[int],
    generated: Sequence[int],
    checker: StopChecker,
    *,
    vocab_size: int,
    skip_special_tokens: bool,
) -> tuple[int, list[int]]:
    """The tokens whose text is what the client has seen of the completion.

    Args:
        before: the tokens before the completion.
        generated: the completion.
        checker: has followed the completion to its stop string.
        vocab_size: V. A tokenizer may have tokens that the model does not have.
        skip_special_tokens: whether the text leaves special tokens out.

    Returns:
        How many of the completion's first tokens stay, and the tokens that replace one that only
        begins before the cut.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([*before, *ids], skip_special_tokens=skip_special_tokens)

    def special(token: int) -> bool:
        return tokenizer.special_text(token) is not None

    def is_text(token: int) -> bool:
        return token < vocab_size and not special(token)

    encode_rest = partial(_tokens_of, tokenizer=tokenizer, is_text=is_text, decode=decode)
    prompt = len(decode(()))
    splits = checker.splits()
    first = next(splits)
    # Special tokens before the cut stay: text that is encoded again has none.
    least = next((at for at in range(first.tokens, 0, -1) if special(generated[at - 1])), 0)
    rest_of = takewhile(lambda split: split.tokens >= least, splits)
    nearest = [first, *islice(rest_of, MAX_SPLITS - 1)]
    for split in nearest:
        kept, text = generated[: split.tokens], split.text
        # Tokens that end inside a character show nothing until others complete it. They stay only
        # if what they then decode to is what was shown.
        decoded = decode(kept)[prompt:] if kept else ""
        late = decoded.removeprefix(text)
        if decoded.startswith(text) and split.rest.startswith(late):
            return len(kept), encode_rest(split.rest.removeprefix(late), kept=kept)
    # Of the splits with the most text, take the one with the fewest tokens: its last token has
    # brought text.
    most = len(first.text)
    alike = [*nearest, *takewhile(lambda split: len(split.text) == most, rest_of)]
    whole = next(split for split in reversed(alike) if len(split.text) == most)
    kept = generated[: whole.tokens]
    return len(kept), encode_rest(whole.rest, kept=kept)


def _tokens_of(
    rest: str,
    *,
    tokenizer: Tokenizer,
    is_text: Callable[[int], bool],
    decode: Callable[[Sequence[int]], str],
    kept: Sequence[int],
) -> list[int]:
    if not rest:
        return []
    wanted = decode(kept) + rest
    alone = tokenizer.encode(rest, special_tokens=False)
    for ids in (alone, tokenizer.encode_inner(rest)):
        if all(map(is_text, ids)) and decode([*kept, *ids]) == wanted:
            return ids
    if all(map(is_text, alone)):
        return alone  # a tokenizer that normalizes text has no tokens for it
    # The text spells the name of a special token, or of a token that the model does not have, and
    # is not that token.
    letters = [
        tokenizer.encode_inner(letter) or tokenizer.encode(letter, special_tokens=False)
        for letter in rest
    ]
    return [token for ids in letters for token in ids if is_text(token)]
