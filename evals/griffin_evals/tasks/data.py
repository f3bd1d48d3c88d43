"""Local files: finds the file of each task, and checks all lines before anything is run."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from griffin_core.errors import shortened
from griffin_evals.tasks import Task, squeezed
from griffin_evals.tasks.columns import Document, Row
from griffin_evals.tasks.errors import BadDataFile
from griffin_evals.tasks.windows import CONTEXT_WORDS, SCORED_WORDS, plain, windows

MOST_SHOWN = 80
"""The most characters of a wrong value that a message shows."""


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """A file that has been read and checked.

    Args:
        documents: at least one; see ``columns``.
        text: the plain text of a text file.
    """

    documents: Sequence[Document]
    text: str = ""


def files_of(task: Task, directory: Path) -> list[Path]:
    """Returns the files of a directory whose names begin with the task's name or an alias."""
    names = tuple(map(squeezed, (task.name, *task.aliases)))
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix == task.suffix and squeezed(path.stem).startswith(names)
    )


def file_of(task: Task, directory: Path) -> Path:
    """Returns the only file of ``files_of``.

    Raises:
        BadDataFile: there is none, or several.
    """
    found = files_of(task, directory)
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise BadDataFile(
            f"{task.name}: found {got} in {directory}; allowed: one file {task.name}*{task.suffix}"
        )
    return found[0]


def read(task: Task, path: Path) -> LocalData:
    """Reads and checks a task's file.

    Raises:
        BadDataFile: names file, line and column, what was found and what is allowed.
    """
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise BadDataFile(f"{path.name}: {error.strerror or error}") from error
    if task.kind == "text":
        text = plain(_decoded(data, path.name))
        documents = [{"context": c, "continuation": s} for c, s in windows(text)]
        needed = CONTEXT_WORDS + SCORED_WORDS
        allowed = f"at least {needed}, of which the first {CONTEXT_WORDS} choose the experts"
        if not documents:
            raise BadDataFile(f"{path.name}: found {len(text.split())} words; allowed: {allowed}")
    else:
        text = ""
        documents = _documents(task, _rows(task, path, data), path)
    return LocalData(documents=documents, text=text)


def _documents(task: Task, rows: Sequence[Row], path: Path) -> list[Document]:
    shown = rows[0].examples
    documents = [doc for row in rows[shown:] for doc in row.documents(rows[:shown])]
    if not documents:
        after = f" after the {shown} that are its examples" if shown else ""
        raise BadDataFile(f"{path.name}: nothing to evaluate; allowed: at least one line{after}")
    return documents


def _rows(task: Task, path: Path, data: bytes) -> list[Row]:
    rows: list[Row] = []
    layout: type[Row] | None = None
    for line_number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {line_number}"
        try:
            value = json.loads(_decoded(line, where))
            json.dumps(
                value, ensure_ascii=False
            ).encode()  # refuses lone surrogates, such as \ud800
        except (ValueError, RecursionError) as error:  # also for numbers with too many digits
            raise BadDataFile(
                f"{where}: found {_shown(line.decode())}; allowed: one JSON object a line ({error})"
            ) from error
        if not isinstance(value, dict):
            raise BadDataFile(f"{where}: found {_shown(value)}; allowed: one JSON object a line")
        layout = layout or _layout(task, value, where)
        rows.append(_row(layout, value, where))
    if not rows:
        raise BadDataFile(f"{path.name}: found no line; allowed: one JSON object a line")
    return rows


def _layout(task: Task, first: Mapping[str, Any], where: str) -> type[Row]:
    """Returns the layout whose columns the first line has."""
    for row in task.rows:
        if set(row.columns()) <= first.keys():
            return row
    allowed = "; or ".join(", ".join(row.columns()) for row in task.rows)
    found = ", ".join(first) or "none"
    raise BadDataFile(f"{where}: found columns {found}; allowed for {task.name}: {allowed}")


def _row(layout: type[Row], value: Mapping[str, Any], where: str) -> Row:
    try:
        return layout.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        column = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            allowed = ", ".join(layout.columns())
            found = ", ".join(value) or "none"
            message = f"column {column} is missing; found {found}; allowed: {allowed}"
        else:
            allowed = first["msg"].removeprefix("Value error, ")
            message = f"column {column}: found {_shown(first['input'])}; allowed: {allowed}"
        raise BadDataFile(f"{where}, {message}") from None


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise BadDataFile(f"{where}: found {at}; allowed: UTF-8") from error


def _shown(value: object) -> str:
    return shortened(value if isinstance(value, str) else repr(value), MOST_SHOWN)
