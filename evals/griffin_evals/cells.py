"""Cells: the results of one model on one task with one setting, a JSON file each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from griffin_core.spec.choices import ScoreMode
from griffin_evals.tasks.errors import EvaluationError

DENSE = "dense"
"""The policy of the run at density 1, which has no policy of its own."""

DIVERGENCE, SPEED = "divergence", "speed"
"""Measurements other than tasks: KL and agreement with dense, and tokens per second."""


@dataclass(frozen=True, kw_only=True, order=True)
class Setting:
    """How a task is run.

    Args:
        policy: ``DENSE`` at density 1 and only there, whose mode is "generation".
    """

    mode: ScoreMode
    density: float
    policy: str

    @property
    def dense(self) -> bool:
        return self.policy == DENSE


DENSE_SETTING = Setting(mode="generation", density=1.0, policy=DENSE)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that a cell's figures depend on. Equal identities are not measured again.

    Args:
        model: its name on the command line; with ``target`` the name that the server reports.
        way: "in process" or "server".
        content: a digest of the task's documents and prompts. The name and version precede it for
            lm-eval's own tasks, and a limit that only this task has follows it.
        limit: the most documents; None for all.
    """

    model: str
    fingerprint: str
    way: str
    dtype: str
    task: str
    content: str
    limit: int | None
    seed: int
    setting: Setting
    lm_eval: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def run(self) -> tuple[Any, ...]:
        """The fields besides task and setting that must be equal for two cells to be compared."""
        of_model = (self.model, self.fingerprint, self.way, self.dtype)
        return (*of_model, self.limit, self.seed, self.lm_eval)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measure of a cell.

    Args:
        value: the measure over all documents.
        stderr: standard error of ``value``; None if there is none.
        higher_is_better: whether more of it is better.
        perplexity: ``value`` is exp of the mean of ``items``, which are nats.
        items: the values of the documents, in the file's order.
    """

    value: float
    stderr: float | None
    higher_is_better: bool
    perplexity: bool = False
    items: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A finished measurement.

    Args:
        measures: the measures by name; the first is the task's score.
        figures: other figures of the run, such as its norm mass and tokens per second.
    """

    identity: Identity
    measures: Mapping[str, Measured]
    figures: Mapping[str, Any]

    @property
    def n(self) -> int:
        return len(next(iter(self.measures.values())).items)


class Cells:
    """A directory of cells. Each is written whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, identity: Identity) -> Path:
        setting = identity.setting
        words = [identity.task, setting.policy, f"{setting.density:g}", setting.mode]
        return self.directory / f"{'-'.join(words)}-{identity.digest[:12]}.json"

    def get(self, identity: Identity) -> Cell | None:
        """Returns the cell with that identity, if it is finished."""
        path = self.path(identity)
        return read_cell(path) if path.exists() else None

    def put(self, cell: Cell) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.path(cell.identity), json.dumps(asdict(cell), indent=1))

    def all(self) -> list[Cell]:
        """Returns all cells, without those for contents that a task no longer has: see
        ``report_on``."""
        cells = [read_cell(path) for path in sorted(self.directory.glob("*.json"))]
        contents = self._contents()
        return [
            cell
            for cell in cells
            if contents.get(cell.identity.task, cell.identity.content) == cell.identity.content
        ]

    def report_on(self, contents: Mapping[str, str]) -> None:
        """Stores which content of each task is reported, since a file may have changed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._contents_path, json.dumps({**self._contents(), **contents}, indent=1))

    @property
    def _contents_path(self) -> Path:
        return self.directory.with_name("contents.json")

    def _contents(self) -> dict[str, str]:
        path = self._contents_path
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise EvaluationError(f"{path}: is damaged ({error}); remove it") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old content or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_cell(path: Path) -> Cell:
    """Reads a cell from its file.

    Raises:
        EvaluationError: the file is not a cell.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        identity = content["identity"]
        identity = Identity(**{**identity, "setting": Setting(**identity["setting"])})
        measures = {name: Measured(**each) for name, each in content["measures"].items()}
        return Cell(identity=identity, measures=measures, figures=content["figures"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{path}: is not a cell of griffin eval ({error}); remove it to measure it again"
        ) from error
