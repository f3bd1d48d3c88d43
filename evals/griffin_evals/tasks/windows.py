"""Splits a text into windows: a first part that chooses the experts, and a second part that is
scored."""

from __future__ import annotations

import re

CONTEXT_WORDS, SCORED_WORDS = 256, 128
"""The number of words in the two parts of a window; about 350 and 170 tokens of WikiText-2."""


def plain(text: str) -> str:
    """Returns a text without WikiText's markup of spaces and numbers, as in lm-eval."""
    # Imported here because lm-eval takes seconds.
    from lm_eval.tasks.wikitext import preprocess_wikitext  # noqa: PLC0415

    return str(preprocess_wikitext.wikitext_detokenizer({"page": text}))


def windows(text: str) -> list[tuple[str, str]]:
    """Returns the windows of a plain text, without overlap; the rest that does not fill a window is
    left out. The second part begins with the space between both."""
    words = re.findall(r"\s*\S+", text)
    step = CONTEXT_WORDS + SCORED_WORDS
    return [
        (
            "".join(words[at : at + CONTEXT_WORDS]).lstrip(),
            "".join(words[at + CONTEXT_WORDS : at + step]),
        )
        for at in range(0, len(words) - step + 1, step)
    ]
