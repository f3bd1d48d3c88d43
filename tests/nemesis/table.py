"""Writes docs/reference/faults.md from the results of ``make faults``.

    python -m tests.nemesis.table RESULTS

Without results it keeps the numbers that the page has.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.nemesis.faults import FAULTS
from tests.nemesis.judge import LATE_S

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "faults.md"

FIRST = (
    "What Griffin promises when something goes wrong, and how often that was tried.",
    "`make faults` writes this page: it runs two prefill servers, one that spoils what it",
    "sends, and a decode server as processes, with a TCP proxy on each wire, and lets three",
    "clients call while the fault happens. Its time-outs are scaled to a second or less, so that a",
    "hundred runs take minutes; three more runs of each fault have those that Griffin ships with.",
    "[tests/nemesis](../../tests/nemesis) has all of it. `make test-e2e` lets each fault happen",
    "once.",
)
THEN = (
    f"After each run a judge looks at every call. It must have ended once, at most {LATE_S:g} s",
    "after its deadline, with OK or a status that the row allows, and its tokens must",
    "be those of a quiet run, or the beginning of those if it failed. Then a call must be answered",
    "again, no session and no file may be left, and the servers must hold hardly more descriptors,",
    "threads and memory than after the first of each 25 runs.",
)

HEADS = (
    *("fault", "promise", "runs", "with shipped time-outs"),
    *("calls that ended well", "that failed as allowed", "retried"),
)


def rows_of(results: Path) -> dict[str, tuple[str, ...]]:
    """The numbers of each row, by its fault."""
    found: dict[str, tuple[str, ...]] = {}
    for number, fault in enumerate(FAULTS):
        samples = sorted(results.glob(f"{number:02}-*.json"))
        runs, calls = Counter[bool](), Counter[str]()
        for path in samples:
            sample: dict[str, Any] = json.loads(path.read_text("utf-8"))
            runs["as-shipped" in path.stem] += sample["runs"]
            calls.update(sample["calls"], retried=sample["retried"])
        failed_parts = len(list(results.glob(f"{number:02}-*.failed")))
        if samples:
            well, retried = calls.pop("OK", 0), calls.pop("retried")
            failed = ", ".join(f"{count:,} {code}" for code, count in sorted(calls.items()))
            lost = f", and {failed_parts} failed" if failed_parts else ""
            counts = (
                f"{runs[False]}{lost}",
                str(runs[True]),
                f"{well:,}",
                failed,
                str(retried or ""),
            )
            found[fault.name] = counts
    return found


def present_rows(text: str) -> dict[str, tuple[str, ...]]:
    """The numbers that the page has."""
    rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    )
    return {row[0]: tuple(row[2:]) for row in rows if len(row) == len(HEADS)}


def page(numbers: dict[str, tuple[str, ...]]) -> str:
    """The whole page."""
    lines = ["# Faults", "", " ".join(FIRST), "", " ".join(THEN), ""]
    lines += [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    for fault in FAULTS:
        cells = numbers.get(fault.name, ("0", "0", "", "", ""))
        lines.append(re.sub(" +", " ", f"| {fault.name} | {fault.promise} | {' | '.join(cells)} |"))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page."""
    numbers = present_rows(PAGE.read_text("utf-8")) if PAGE.exists() else {}
    if sys.argv[1:]:
        numbers |= rows_of(Path(sys.argv[1]))
    PAGE.write_text(page(numbers), "utf-8")


if __name__ == "__main__":
    main()
