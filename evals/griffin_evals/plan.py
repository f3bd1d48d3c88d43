"""The plan of a run of ``griffin eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from griffin_evals.cells import Setting
from griffin_evals.tasks.data import LocalData


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model runs: in this process (``model``), or on a server (``target``)."""

    model: str | None = None
    target: str | None = None

    @property
    def way(self) -> str:
        return "in process" if self.target is None else "server"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked plan of a run.

    Args:
        tasks: the names of the tasks, in order.
        data: the local files of these tasks; None for lm-eval's own from the hub.
        settings: without the dense one, which is always run.
        limit: the most documents of a task, and windows of a text; None for all.
        limits: the limits of tasks that have their own; that of wikitext also limits the windows of
            KL.
        seed: for policies that draw at random.
        speed: whether to measure tokens per second.
        tokenizer, concurrency, wait_s, threads, device: as ``GriffinLM`` takes them.
    """

    sources: Sequence[Source]
    tasks: Sequence[str]
    data: Mapping[str, LocalData] | None
    settings: Sequence[Setting]
    out: Path
    limit: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"
    speed: bool = True
    tokenizer: str | None = None
    concurrency: int = 32
    wait_s: float = 300
    threads: int | None = None
    device: str | None = None

    def limit_of(self, task: str) -> int | None:
        """Returns the most documents of a task; None for all."""
        return self.limits.get(task, self.limit)

    def content_of(self, task: str, content: str) -> str:
        """Returns a task's content, with the task's own limit if it has one, since its figures
        depend on it."""
        return f"{content}, at most {self.limits[task]}" if task in self.limits else content

    @property
    def text(self) -> str:
        """The text that KL is measured on: the local text file, if it is among the tasks."""
        return next((data.text for data in (self.data or {}).values() if data.text), "")

    @property
    def generating(self) -> list[Setting]:
        """The settings in generation mode, each once."""
        return list(
            dict.fromkeys(
                Setting(mode="generation", density=each.density, policy=each.policy)
                for each in self.settings
            )
        )
