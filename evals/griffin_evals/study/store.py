"""Figures on disk, so that a finished part is not measured again."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from griffin_evals.cells import write_whole
from griffin_evals.study.lab import Lab

Figures = dict[str, Any]


class Store:
    """The figures of a model's parts in a folder, a JSON file each.

    Args:
        folder: created if it does not exist.
        settings: the settings that the figures depend on; figures of other settings count as
            missing.
    """

    def __init__(self, folder: Path, settings: Figures) -> None:
        self._folder = folder
        self._settings = settings

    def load(self, part: str) -> Figures | None:
        """The figures of a part; None if they are missing, torn or of other settings."""
        try:
            kept = json.loads((self._folder / f"{part}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if kept.get("settings") != self._settings:
            return None
        figures: Figures = kept["figures"]
        return figures

    def save(self, part: str, figures: Figures) -> None:
        """Writes a part's figures, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"{part}.json", {"settings": self._settings, "figures": figures})


def settings_of(lab: Lab) -> Figures:
    """Returns the settings that the figures of a lab depend on, except the code."""
    every = (*lab.domain_texts, *lab.long_texts)
    texts = [(text.domain, text.name, text.token_ids) for text in every]
    return {
        "model": lab.model.fingerprint,
        "sizes": asdict(lab.sizes),
        "texts": blake2b(repr(texts).encode(), digest_size=16).hexdigest(),
    }


def write_json(path: Path, figures: Figures) -> None:
    """Writes figures with one key or list of numbers on each line, for readable diffs.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    write_whole(path, _lines(figures, 0) + "\n")


def _lines(value: Any, depth: int) -> str:
    inner = [*value.values()] if isinstance(value, dict) else value
    if isinstance(value, (dict, list)) and any(isinstance(each, (dict, list)) for each in inner):
        indent = " " * (depth + 1)
        if isinstance(value, dict):
            rows = [f"{json.dumps(key)}: {_lines(own, depth + 1)}" for key, own in value.items()]
            brackets = "{}"
        else:
            rows = [_lines(own, depth + 1) for own in value]
            brackets = "[]"
        body = ",\n".join(f"{indent}{row}" for row in rows)
        return f"{brackets[0]}\n{body}\n{' ' * depth}{brackets[1]}"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
