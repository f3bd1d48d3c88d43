"""The CPU threads that the model runs on."""

from __future__ import annotations

import logging

import torch

from griffin_core.engine.cpu_share import INTERVAL_S, CpuShare

log = logging.getLogger(__name__)


class ModelThreads:
    """Sets the number of threads of torch. Used by the engine's thread, except for ``count``.

    Args:
        threads: a number, or a share of the CPUs that follows the load of the machine; None for
            torch's default.
        follows: whether the number may change after the start.
    """

    def __init__(self, threads: int | CpuShare | None, *, follows: bool) -> None:
        self._threads = threads
        self._follows = follows

    @property
    def count(self) -> int:
        """Number of threads now."""
        if isinstance(self._threads, CpuShare):
            return self._threads.threads
        return self._threads or torch.get_num_threads()

    def start(self) -> None:
        """Sets the number at the start of the engine's thread."""
        if self._threads is not None:
            torch.set_num_threads(self.count)
        self.follow()  # so that the first turn knows what else ran during the start

    def follow(self) -> None:
        """Sets more or fewer threads if the machine's load says so; for calls between steps."""
        if not self._follows or not isinstance(self._threads, CpuShare):
            return
        if self._threads.follow():
            log.debug("threads: %d", self._threads.threads)
            torch.set_num_threads(self._threads.threads)

    def note_idle(self, seconds: float) -> None:
        """Notes that the engine has had nothing to do for a while."""
        if isinstance(self._threads, CpuShare) and seconds > INTERVAL_S:
            self._threads.forget()
