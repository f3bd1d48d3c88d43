"""The progress of an evaluation, in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Progress over cells: one line before each, since each has its own bar for requests."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("cells"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, TextColumn("{task.description}"), console=console, auto_refresh=False
        )
        self._row = self._progress.add_task("", total=0)
        self.done = self.total = 0

    def expect(self, cells: int) -> None:
        self.total += cells
        self._progress.update(self._row, total=self.total)

    def begin(self, words: str) -> None:
        self._progress.update(self._row, description=words)
        self._console.print(self._progress.get_renderable())

    def finish(self, words: str | None = None) -> None:
        self.done += 1
        self._progress.update(self._row, completed=self.done)
        if words:
            self._console.print(words, markup=False, soft_wrap=True)
