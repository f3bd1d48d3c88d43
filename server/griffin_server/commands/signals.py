"""Signals that come while a command loads a model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context in which SIGINT and SIGTERM end the process at once. By default Ctrl-C would wait
    for the thread that loads a model, and SIGTERM does nothing to process 1 of a container."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: os._exit(128 + got)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
