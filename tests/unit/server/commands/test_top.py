"""`griffin top`: rates from two snapshots, as much as fits, and servers that go and come back."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from rich.console import Console

from griffin_client import ModelInfo, PruningFigures, Session
from griffin_core.model.load import Model
from griffin_server.commands.top import Frame, Snapshot, compare
from tests.servers import Running, eventually, running
from tests.unit.server.commands.test_commands import griffin

MODEL = ModelInfo(
    model="SmolLM2-135M-Instruct",
    family="llama",
    fingerprint="0" * 64,
    layers=30,
    width=576,
    ff_width=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocabulary=49152,
    context_length=8192,
    dtype="bfloat16",
    device="cpu",
    role="all",
    has_chat_template=True,
    default_density=0.75,
    default_policy="topk",
    default_sharing="private",
    max_sessions=32,
    version="0.1.0",
)


def session(name: str, *, kv: int = 0, view: int = 0, **given: Any) -> Session:
    pruning = PruningFigures(
        density=0.75,
        policy="topk",
        experts_per_layer=1152,
        expert_counts=(1152,) * 2,
        ff_width=1536,
        mean_norm_mass=0.9,
        norm_mass=(0.9,),
        slim_view_bytes=view,
        kv_cache_bytes=kv,
        mean_density=0.75,
        dense_tokens=1,
    )
    figures = {
        "state": "decode",
        "context_tokens": 100,
        "generated_tokens": 0,
        "age_s": 1.0,
        "idle_s": 0.0,
        "reserved_bytes": 0,
    }
    return Session(session_id=name, pruning=pruning, **{**figures, **given})


def seen(at_s: float, *sessions: Session) -> Snapshot:
    return Snapshot(at_s=at_s, model=MODEL, sessions=sessions)


def drawn(
    snapshot: Snapshot, *, before: Snapshot | None = None, height: int | None = None
) -> list[str]:
    """The lines of a frame on a terminal of 80 columns."""
    console = Console(width=80, color_system=None)
    frame = Frame(target="localhost:50051", activity=compare(before, snapshot))
    options = console.options.update(height=height)
    lines = console.render_lines(frame, options, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_a_rate_is_the_tokens_between_two_looks_over_the_time_between_them() -> None:
    before = seen(10.0, session("a", generated_tokens=100), session("b", generated_tokens=7))
    now = seen(12.0, session("a", generated_tokens=150), session("b", generated_tokens=7))
    activity = compare(before, now)
    assert [row.tokens_per_s for row in activity.rows] == [25.0, 0.0]
    assert activity.tokens_per_s == 25.0


def test_a_session_that_is_new_began_at_no_tokens() -> None:
    before = seen(0.0, session("ended", generated_tokens=900))
    (row,) = compare(before, seen(0.5, session("new", generated_tokens=20))).rows
    assert row.tokens_per_s == 40.0


def test_a_first_look_knows_no_rates() -> None:
    activity = compare(None, seen(0.0, session("a", generated_tokens=100)))
    assert activity.tokens_per_s is None
    assert [row.tokens_per_s for row in activity.rows] == [None]
    assert drawn(seen(0.0))[2].startswith("- tokens/s")


def test_sessions_that_decode_come_first_and_the_oldest_of_each_state_before_others() -> None:
    states = {"a": "idle", "b": "queued", "c": "decode", "d": "prefill", "e": "decode"}
    snapshot = seen(0.0, *(session(name, state=state) for name, state in states.items()))
    activity = compare(None, snapshot)
    assert [row.session.session_id for row in activity.rows] == ["c", "e", "d", "b", "a"]
    assert activity.states == {"decode": 2, "prefill": 1, "queued": 1, "idle": 1}


def test_memory_is_the_sum_over_sessions() -> None:
    snapshot = seen(
        0.0,
        session("a", kv=1 << 20, view=2 << 20, reserved_bytes=5 << 20),
        session("b", kv=2 << 20, view=3 << 20, reserved_bytes=6 << 20, state="idle"),
    )
    summary = drawn(snapshot)[2]
    assert "KV 3.0 MiB · slim views up to 5.0 MiB · reserved 11.0 MiB" in summary


def test_a_row_says_only_what_is_known() -> None:
    snapshot = seen(
        0.0,
        session("0123456789abcdef", state="idle", kv=3 << 20, age_s=60.4, idle_s=7.0),
        session("waits", state="queued"),
    )
    waits, idle = (line.split() for line in drawn(snapshot)[-2:])
    assert waits == ["waits", "queued", "-", "100", "0.75", "0.0", "0.0", "0.0", "1", "-"]
    assert idle[:5] == ["01234567", "idle", "-", "100", "0.75"]
    assert idle[5:] == ["3.0", "0.0", "0.0", "60", "7"]


def test_large_figures_fit_into_80_columns() -> None:
    large = {"context_tokens": 131072, "age_s": 86400.0, "state": "prefill"}
    rows = session("0" * 32, kv=9 << 33, view=9 << 30, reserved_bytes=9 << 33, **large)
    lines = drawn(seen(1.0, rows), before=seen(0.0))
    assert "…" not in "".join(lines[4:])
    assert lines[-1].split()[5:8] == ["73728.0", "9216.0", "73728.0"]


@pytest.mark.parametrize(
    ("height", "rows"), [(7, 0), (8, 1), (15, 8), (16, 10), (17, 10), (40, 10)]
)
def test_a_frame_shows_as_many_sessions_as_fit_and_counts_the_others(
    height: int, rows: int
) -> None:
    snapshot = seen(0.0, *(session(f"s{number}") for number in range(10)))
    lines = drawn(snapshot, height=height)  # what is higher would be cut off at its end
    assert sum("0.75" in line for line in lines) == rows
    if rows < 10:
        assert lines[-1] == f"and {10 - rows} more"


def test_without_a_bound_a_frame_has_all_sessions() -> None:
    snapshot = seen(0.0, *(session(f"s{number}") for number in range(100)))
    assert len(drawn(snapshot)) == 4 + 2 + 100


@pytest.fixture(scope="module")
def long_server(tiny: Callable[[str], Model]) -> Iterator[Running]:
    """A server whose sessions can run for thousands of tokens."""
    with running(tiny("llama-long"), density=0.5) as server:
        yield server


@contextmanager
def generating(server: Running, streams: int = 2) -> Iterator[None]:
    """So many sessions generate, the next as soon as one ends, until the block ends."""
    done = threading.Event()

    def stream() -> None:
        with server.client() as client:
            while not done.is_set():
                endless = {"max_tokens": 4000, "ignore_eos": True}
                with closing(client.generate("a", **endless)) as events:
                    for _ in events:
                        if done.is_set():
                            break

    threads = [threading.Thread(target=stream) for _ in range(streams)]
    for thread in threads:
        thread.start()
    try:
        with server.client() as client:
            eventually(lambda: sum(s.state == "decode" for s in client.list_sessions()) == streams)
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_once_prints_what_a_server_does_between_two_looks(long_server: Running) -> None:
    with generating(long_server):
        out, err = griffin("top", "--once", "--interval-s", "0.2", "--target", long_server.target)
    assert err == ""
    assert "\x1b" not in out  # no control sequences
    model, sessions, figures, _, *table = out.splitlines()
    assert model.endswith(f"· cpu · float32 · role all · {long_server.target}")
    assert " decode · " in sessions and "queued" in sessions
    assert float(figures.partition(" ")[0]) > 0
    rows = [line.split() for line in table[2:]]
    decoding = [row for row in rows if row[1] == "decode"]
    assert decoding and rows[: len(decoding)] == decoding
    _, _, rate, context, density, *memory, _, idle = decoding[0]
    assert float(rate) > 0 and int(context) > 1
    assert density == "0.5"
    assert len(memory) == 3 and float(memory[2]) > 0
    assert idle == "-"


def test_a_pipe_gets_one_table_of_a_server_at_rest(tiny_server: Running) -> None:
    out, err = griffin("top", "--interval-s", "0.01", "--target", tiny_server.target)
    assert err == ""
    assert len(out.splitlines()) == 4
    assert "sessions: 0 decode · 0 prefill · 0 queued · 0 idle · at most" in out
    assert "0.0 tokens/s · KV 0.0 MiB" in out


def test_once_says_that_a_server_is_gone() -> None:
    out, err = griffin("top", "--once", "--target", "127.0.0.1:1", status=1)
    assert out == ""
    assert err.startswith("griffin: 127.0.0.1:1 does not answer: UNAVAILABLE")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "3601"])
def test_a_bad_interval_is_one_line(value: str) -> None:
    out, err = griffin("top", "--interval-s", value, status=2)
    assert out == ""
    assert err == f"griffin: interval-s: got {value}; allowed: (0, 3600]\n"


class Terminal:
    """`griffin top` on a terminal of 100 columns and 12 lines."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "griffin_server", "top", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "12"},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def read(self, words: str, *, within_s: float = 30) -> str:
        """What it shows from now on, up to some words."""
        shown, deadline = "", time.monotonic() + within_s
        while words not in shown:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {words!r} within {within_s} s in {shown!r}"
            shown += os.read(self._ours, 65536).decode(errors="replace")
        self.shown += shown
        return shown

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C, or another signal; its exit code."""
        self.process.send_signal(number)
        self.read("\x1b[?1049l")  # back from the other screen
        status = self.process.wait(30)
        while select.select([self._ours], [], [], 0)[0]:
            try:
                self.shown += os.read(self._ours, 65536).decode(errors="replace")
            except OSError:  # Linux: all of it is read and nobody has the other end
                break
        return status

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


def test_a_terminal_follows_a_server_that_goes_and_comes_back(
    tiny: Callable[[str], Model],
) -> None:
    model, kept = tiny("llama"), {"max_tokens": 2, "keep_session": True}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    target = f"127.0.0.1:{port}"
    with Terminal("--target", target, "--interval-s", "0.05") as terminal:
        terminal.read(f"{target} does not answer: UNAVAILABLE")
        with running(model, port=port) as server, server.client() as client:
            first = client.complete("a", **kept).started.session_id[:8]
            terminal.read(first)
            terminal.read("0.0 tokens/s")
        terminal.read("Trying again; Ctrl-C ends.")
        with running(model, port=port) as server, server.client() as client:
            second = client.complete("a", **kept).started.session_id[:8]
            assert first not in terminal.read(second)
            assert terminal.interrupt() == 0
    assert terminal.shown.count("\x1b[?1049h") == terminal.shown.count("\x1b[?1049l") == 1
    assert terminal.shown.count("\x1b[?25l") == terminal.shown.count("\x1b[?25h") == 1
    for words in ("Traceback", "Aborted", "WARNING"):
        assert words not in terminal.shown


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_an_early_signal_leaves_the_terminal_clean(number: int, status: int) -> None:
    with Terminal("--target", "127.0.0.1:1") as terminal:
        terminal.read("\x1b[?1049h")  # the other screen, with nothing on it yet
        assert terminal.interrupt(number) == status
    assert terminal.shown.count("\x1b[?25l") == terminal.shown.count("\x1b[?25h") == 1
