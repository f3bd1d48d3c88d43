"""Reading the values of arguments and options."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from griffin_server.commands.failures import fail


def read_prompt(prompt: str) -> str:
    """A prompt as given, from standard input for "-", or from a file for "@FILE"."""
    try:
        if prompt == "-":
            return sys.stdin.read()
        if prompt.startswith("@"):
            return Path(prompt[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"prompt: {error}")
    return prompt


def json_object(name: str, text: str | None) -> dict[str, Any] | None:
    """The JSON object in an option's text; None if the option is not given."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        fail(f"{name}: got {text!r}; allowed: a JSON object", status=2)
    return value


def number_range(name: str, text: str) -> tuple[int, int]:
    """The least and most of an option's text: a number, or least:most."""
    least, _, most = text.partition(":")
    try:
        values = int(least), int(most or least)
    except ValueError:
        values = 0, 0
    if not 1 <= values[0] <= values[1]:
        fail(f"{name}: got {text!r}; allowed: a number >= 1, or least:most", status=2)
    return values
