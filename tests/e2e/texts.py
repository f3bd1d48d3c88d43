"""Real text of known length: the article of the demo, and the licence."""

from __future__ import annotations

from pathlib import Path

from griffin_core.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
ARTICLE = (ROOT / "demo" / "article.txt").read_text(encoding="utf-8")
LICENCE = (ROOT / "LICENSE").read_text(encoding="utf-8")


def cut(text: str, tokens: int, tokenizer: Tokenizer) -> list[int]:
    """The first so many tokens of a text that has them."""
    ids = tokenizer.encode(text)[:tokens]
    assert len(ids) == tokens
    return ids
