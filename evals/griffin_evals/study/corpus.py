"""The texts of the study: the shipped ones by domain, long ones, and those of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

SHIPPED = Path(__file__).parent / "texts"
ROOT = Path(__file__).parents[3]
"""The repository, whose documents serve as long texts if the package runs from a checkout."""

WRITTEN = "STUDY.md"
"""The page that the study writes is not one of its texts."""

Corpus = dict[str, dict[str, str]]
"""Domain -> name of a text -> the text."""


class BadText(ValueError):
    """A folder or file of texts that cannot be used, by name and line."""


def load_corpus(data: Path | None = None) -> Corpus:
    """The shipped texts. A domain of ``data`` replaces the shipped one of its name, or is added.

    Args:
        data: a folder with a folder of ``*.txt`` and ``*.jsonl`` files for each domain, or with a
            ``DOMAIN.jsonl``; every line of those is an object with the string "text".

    Raises:
        BadText: names the folder, the file or the line.
    """
    corpus = _domains(SHIPPED)
    if data is None:
        return corpus
    if not data.is_dir():
        raise BadText(f"--data: got {data}; allowed: a folder")
    given = _domains(data)
    if not given:
        raise BadText(f"--data: {data} has no DOMAIN/*.txt, DOMAIN/*.jsonl or DOMAIN.jsonl")
    return corpus | given


def load_long(corpus: Corpus) -> dict[str, str]:
    """Long texts by name: documents of the repository, if there is one, and all texts of
    each domain joined."""
    paths = [ROOT / "LICENSE", ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    documents = {
        path.name: path.read_text(encoding="utf-8")
        for path in paths
        if path.is_file() and path.name != WRITTEN
    }
    joined = {f"all of {name}": "\n\n".join(texts.values()) for name, texts in corpus.items()}
    return joined | documents


def _domains(folder: Path) -> Corpus:
    corpus: Corpus = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            texts: dict[str, str] = {}
            for file in sorted([*path.glob("*.txt"), *path.glob("*.jsonl")]):
                texts.update(_texts(file))
            if texts:
                corpus[path.name] = texts
        elif path.suffix == ".jsonl":
            corpus[path.stem] = dict(_texts(path))
    return corpus


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadText(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if file.suffix == ".txt":
        yield file.stem, content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadText(f"{file}:{number}: no JSON object with a field text") from error
        if not isinstance(text, str):
            raise BadText(f"{file}:{number}: text is {type(text).__name__}; allowed: a string")
        yield f"{file.stem}-{number}", text
