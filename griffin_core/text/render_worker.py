"""The process that renders chat templates, which are foreign programs, within bounds of its own.

It is run by its path, imports neither torch nor Griffin, and answers on a pipe until that is
closed; see ``renderers``. A request is the pickled arguments of transformers'
``render_jinja_template``, an answer is JSON: ``{"text": ...}``, or what was raised.
"""

import json
import pickle
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

MOST_CHARACTERS = 16 << 20
"""The most characters of a rendered text."""


def main(descriptor: int, seconds: float, memory_bytes: int) -> None:
    """Answers until the other end of the pipe is closed.

    Args:
        descriptor: of the pipe.
        seconds: the most for one request; then the process ends.
        memory_bytes: the most that the process may have.
    """
    pipe = Connection(descriptor)
    with suppress(OSError, ValueError):  # not on every system
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)  # ends it even if the caller is gone
        pipe.send_bytes(json.dumps(answer(pickle.loads(request))).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


def answer(arguments: dict[str, Any]) -> dict[str, Any]:
    """The text, or what a template raised: it may be anything."""
    try:
        (text,), _ = render_jinja_template(**arguments)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it makes {len(text)} characters; allowed: {MOST_CHARACTERS}")
    except Exception as error:
        return {
            "kind": type(error).__name__,
            "words": str(error)[:1000],
            "of_template": isinstance(error, TemplateError),
        }
    return {"text": text}


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
