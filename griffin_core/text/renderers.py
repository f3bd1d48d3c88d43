"""Processes that render chat templates: a template that does not end, or takes more and more
memory, ends its process and nothing else."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("render_worker.py")

MOST_PROCESSES = 3
"""The most templates that are rendered at once; further ones wait."""

RENDER_S = 5.0
"""The most seconds that a template may run. Ordinary templates take a millisecond for tens of
messages."""

MEMORY_BYTES = 1 << 30
"""The most memory of a process, which starts with 0.06 GiB."""

START_S = 60.0
"""The most seconds that a process takes to start, which are 0.6 on an idle CPU."""

ANSWER_BYTES = 256 << 20
"""The most bytes of an answer; JSON may take twelve for a character."""

ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "HOME", "HF_HOME", "TMPDIR", "SYSTEMROOT")
"""The variables that a process gets. It gets no keys and no tokens."""


class RenderFailed(Exception):
    """A template raised something, or its process did not answer.

    Args:
        kind: the name of the type of what it raised.
        words: its message.
        of_template: whether it is one of jinja2's errors.
    """

    def __init__(self, kind: str, words: str, *, of_template: bool = True) -> None:
        super().__init__(words)
        self.kind = kind
        self.words = words
        self.of_template = of_template


class TooSlow(RenderFailed):
    """A template ran for longer than ``RENDER_S``."""

    def __init__(self, seconds: float) -> None:
        super().__init__("TooSlow", f"it takes longer than {seconds:g} s")


class Answered(RenderFailed):
    """A template raised something, and its process goes on."""


class _Process:
    """One process, which is starting when this returns."""

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._ready = False
        with theirs:
            # -P: the worker's directory is no place to import from.
            command = [sys.executable, "-P", os.fspath(WORKER)]
            limits = [str(theirs.fileno()), str(2 * RENDER_S), str(MEMORY_BYTES)]
            self._process = subprocess.Popen(
                [*command, *limits],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
                | {"OPENBLAS_NUM_THREADS": "1"},  # numpy's threads would only wait
            )

    def render(self, arguments: dict[str, Any]) -> str:
        """The rendered text.

        Raises:
            Answered: the template raised something.
            RenderFailed: the process has ended.
            TooSlow: it took too long.
        """
        try:
            if not self._ready:
                if not self._pipe.poll(START_S):
                    raise EOFError
                self._pipe.recv_bytes(64)
                self._ready = True
            self._pipe.send_bytes(pickle.dumps(arguments))
            if not self._pipe.poll(RENDER_S):
                raise TooSlow(RENDER_S)
            answer = json.loads(self._pipe.recv_bytes(ANSWER_BYTES))
        except (EOFError, OSError) as error:
            raise RenderFailed(
                "ProcessEnded", "its process has ended, perhaps for lack of memory"
            ) from error
        if "text" not in answer:
            raise Answered(answer["kind"], answer["words"], of_template=answer["of_template"])
        text: str = answer["text"]
        return text

    @property
    def ended(self) -> bool:
        """Whether the process has ended by itself."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


class Renderers:
    """Up to ``MOST_PROCESSES`` processes, started when they are needed. Thread-safe."""

    def __init__(self) -> None:
        self._idle: list[_Process] = []
        self._places = threading.Semaphore(MOST_PROCESSES)
        self._lock = threading.Lock()

    def render(self, **arguments: Any) -> str:
        """Renders a template.

        Args:
            arguments: of transformers' ``render_jinja_template``, which can be pickled.

        Raises:
            RenderFailed: the template raised something, or ended its process.
            TooSlow: it took too long.
        """
        with self._places:
            process = self._take()
            try:
                text = process.render(arguments)
            except Answered:
                self._idle.append(process)
                raise
            except BaseException:
                process.close()
                raise
            self._idle.append(process)
            return text

    def _take(self) -> _Process:
        """An idle process, or a new one."""
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if not process.ended:
                    return process
                process.close()
        return _Process()

    def close(self) -> None:
        """Ends the idle processes; later renderings start new ones."""
        with self._lock:
            while self._idle:
                with suppress(OSError):
                    self._idle.pop().close()


RENDERERS = Renderers()
"""Those of this process, for all models."""

atexit.register(RENDERERS.close)
