"""Parts of generated pages: tables in Markdown, and sentences from docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table with one line for each row. Cells may contain vertical bars."""
    lines = [head, ("---",) * len(head), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(documented: type) -> str:
    """The first paragraph of a class's docstring, as one line of Markdown."""
    paragraph = inspect.cleandoc(documented.__doc__ or "").partition("\n\n")[0]
    return re.sub(r"``(.*?)``", r"`\1`", " ".join(paragraph.split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
