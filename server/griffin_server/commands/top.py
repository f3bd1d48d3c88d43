"""`griffin top`: shows the activity of a running server, from snapshots taken by ordinary calls.

A snapshot has the sessions that are live when it is taken. Tokens that a session generates after
its last snapshot are not counted, so the total rate is a little low, and much too low if requests
are shorter than the interval. Sessions that share a slim view each report all of its bytes, so the
sum is an upper bound.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from griffin_client import (
    Cancelled,
    DeadlineExceeded,
    GriffinClient,
    GriffinClientError,
    ModelInfo,
    Session,
    Unavailable,
)
from griffin_server.commands.calls import call_errors
from griffin_server.commands.failures import fail
from griffin_server.commands.options import Target

app = typer.Typer()

STATES = ("decode", "prefill", "queued", "idle")
"""The states of sessions, in the order of the table."""

GONE = (Unavailable, DeadlineExceeded, Cancelled)
"""The errors of calls to a server that stops, hangs or does not exist."""

TIMEOUT_S = 5.0


@app.command()
def top(
    target: Target = "localhost:50051",
    interval_s: Annotated[
        float, typer.Option(help="Seconds between two snapshots, in (0, 3600].")
    ] = 1.0,
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="Print one table after one interval; the default without a terminal."
        ),
    ] = False,
) -> None:
    """Watch a running server: its sessions, their tokens per second and their memory."""
    if not 0 < interval_s <= 3600:
        fail(f"interval-s: got {interval_s:g}; allowed: (0, 3600]", status=2)
    on_terminal = sys.stdout.isatty()
    # rich assumes 80 columns where there is no terminal, and cuts the rest.
    console = Console(highlight=False, width=None if on_terminal else 200)
    with call_errors():
        if on_terminal and not (once or console.is_dumb_terminal):
            watch(target, interval_s, console)
            return
        try:
            console.print(observe_once(target, interval_s))
        except GONE as error:
            fail(gone(target, error))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A server's answers at ``at_s`` of this process's monotonic clock, with the oldest session
    first."""

    at_s: float
    model: ModelInfo
    sessions: Sequence[Session]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A session, and its tokens per second since the snapshot before; None in the first one."""

    session: Session
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Activity:
    """A server's activity between two snapshots.

    Args:
        rows: the sessions by state in the order of ``STATES``, with the oldest of each first.
        states: the number of sessions in each state.
        tokens_per_s: the sum over all rows; None in the first snapshot.
        slim_view_bytes: the sum over all rows, which counts a shared view several times.
    """

    model: ModelInfo
    rows: Sequence[Row]
    states: dict[str, int]
    tokens_per_s: float | None
    kv_cache_bytes: int
    slim_view_bytes: int
    reserved_bytes: int


def compare(before: Snapshot | None, now: Snapshot) -> Activity:
    """The activity between two snapshots. A new session began with 0 generated tokens."""
    sessions = sorted(now.sessions, key=lambda session: STATES.index(session.state))
    if before is None:
        rows = [Row(session=session, tokens_per_s=None) for session in sessions]
        total = None
    else:
        earlier = {session.session_id: session.generated_tokens for session in before.sessions}
        elapsed_s = now.at_s - before.at_s
        made = [each.generated_tokens - earlier.get(each.session_id, 0) for each in sessions]
        rows = [
            Row(session=session, tokens_per_s=tokens / elapsed_s)
            for session, tokens in zip(sessions, made, strict=True)
        ]
        total = sum(made) / elapsed_s
    states = Counter[str](session.state for session in sessions)
    return Activity(
        model=now.model,
        rows=rows,
        states={state: states[state] for state in STATES},
        tokens_per_s=total,
        kv_cache_bytes=sum(session.pruning.kv_cache_bytes for session in sessions),
        slim_view_bytes=sum(session.pruning.slim_view_bytes for session in sessions),
        reserved_bytes=sum(session.reserved_bytes for session in sessions),
    )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """An activity that rich can draw, cut to the height of the terminal if there is one."""

    target: str
    activity: Activity

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The summary, and below it a table of as many rows as fit."""
        head, rows = self._summary(), self.activity.rows
        shown = len(rows)
        if options.height is not None:
            room = max(0, options.height - len(head) - 2)  # the table's heading has two lines
            shown = shown if shown <= room else max(0, room - 1)
        yield from head
        if rows:
            yield _table(rows[:shown])
        if shown < len(rows):
            yield Text(f"and {len(rows) - shown} more", style="dim")

    def _summary(self) -> list[Text]:
        model, activity = self.activity.model, self.activity
        sessions = " · ".join(f"{count} {state}" for state, count in activity.states.items())
        lines = (
            f"{model.model} · {model.device} · {model.dtype} · role {model.role} · {self.target}",
            f"sessions: {sessions} · at most {model.max_sessions} live",
            f"{_rate(activity.tokens_per_s)} tokens/s · KV {_mib(activity.kv_cache_bytes)} MiB · "
            f"slim views up to {_mib(activity.slim_view_bytes)} MiB · "
            f"reserved {_mib(activity.reserved_bytes)} MiB",
            "",
        )
        return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("session", no_wrap=True)
    table.add_column("state", no_wrap=True)
    numbers = "tokens\n/s", "context\ntokens", "density"
    memory = "KV\nMiB", "view\nMiB", "reserved\nMiB"
    for heading in (*numbers, *memory, "age\ns", "idle\ns"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        session, figures = row.session, row.session.pruning
        table.add_row(
            session.session_id[:8],
            session.state,
            _rate(row.tokens_per_s),
            str(session.context_tokens),
            f"{figures.density:g}",
            _mib(figures.kv_cache_bytes),
            _mib(figures.slim_view_bytes),
            _mib(session.reserved_bytes),
            f"{session.age_s:.0f}",
            f"{session.idle_s:.0f}" if session.state == "idle" else "-",
            style="dim" if session.state == "idle" else None,
        )
    return table


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def gone(target: str, error: GriffinClientError) -> str:
    """The message for a server that does not answer."""
    return f"{target} does not answer: {error}"


def take_snapshot(client: GriffinClient) -> Snapshot:
    """Asks a server for its model and sessions.

    Raises:
        GriffinClientError: it did not answer.
    """
    model = client.model_info(timeout=TIMEOUT_S)
    sessions = client.list_sessions(timeout=TIMEOUT_S)
    return Snapshot(at_s=time.monotonic(), model=model, sessions=sessions)


def observe_once(target: str, interval_s: float) -> Frame:
    """A server's activity during one interval.

    Raises:
        GriffinClientError: it did not answer.
    """
    with GriffinClient(target, max_retries=0) as client:
        before = take_snapshot(client)
        time.sleep(interval_s)
        return Frame(target=target, activity=compare(before, take_snapshot(client)))


def watch(target: str, interval_s: float, console: Console) -> None:
    """Shows a server on the terminal's alternate screen until Ctrl-C, even if it does not answer.

    Raises:
        GriffinClientError: the server refuses the calls, as one in role prefill does.
    """
    live = Live(Text(f"asking {target}"), console=console, screen=True)
    signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # raises, so that live.stop runs
    with contextlib.suppress(KeyboardInterrupt):
        try:
            with _uninterrupted():
                live.start(refresh=True)
            while True:
                error = _follow(target, interval_s, live)
                message = f"{gone(target, error)}\nTrying again; Ctrl-C ends."
                live.update(Text(message, style="red"), refresh=True)
                time.sleep(interval_s)
        finally:
            with _uninterrupted():
                live.stop()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM, because an interrupted start or stop would leave the terminal on
    its alternate screen."""
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda got, _: came.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for got in came:
        signal.raise_signal(got)


def _follow(target: str, interval_s: float, live: Live) -> GriffinClientError:
    """Shows a server until a call fails, and returns the error.

    The connection is closed then, because a failed one waits up to two minutes to reconnect.
    """
    before: Snapshot | None = None
    try:
        with GriffinClient(target, max_retries=0) as client:
            while True:
                now = take_snapshot(client)
                frame = Frame(target=target, activity=compare(before, now))
                live.update(frame, refresh=True)
                before = now
                time.sleep(interval_s)
    except GONE as error:
        return error
