"""`griffin top`: what a running server does, in looks at it through its own calls.

A look sees the sessions of one moment. The last tokens of a session that ends between two looks are
in no rate, so the rate of all is a little low, and much too low where requests are shorter than the
interval. Sessions may share a slim view and each reports all of it, so their sum is the most that
views hold.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

STATES = ("decode", "prefill", "queued", "idle")
"""Of sessions, in the order they are shown."""

GONE = (Unavailable, DeadlineExceeded, Cancelled)
"""What calls raise on a server that stops, hangs or is not there."""

TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a server said at ``at_s`` of this side's monotonic clock; sessions oldest first."""

    at_s: float
    model: ModelInfo
    sessions: Sequence[Session]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A session, and what it generated a second since the look before; None at the first look."""

    session: Session
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What a server does, as two looks show it.

    Args:
        rows: by state in the order of ``STATES``, the oldest of each first.
        states: how many sessions are in each.
        tokens_per_s: of all rows; None at the first look.
        slim_view_bytes: a view that sessions share is in it once for each of them.
    """

    model: ModelInfo
    rows: Sequence[Row]
    states: dict[str, int]
    tokens_per_s: float | None
    kv_cache_bytes: int
    slim_view_bytes: int
    reserved_bytes: int


def compare(before: Look | None, now: Look) -> Activity:
    """What happened between two looks. A session that is new began at 0 generated tokens."""
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
    """An activity as rich draws it: as high as it may be, else with all rows."""

    target: str
    activity: Activity

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The summary, then a table of as many rows as have room below it."""
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
    """Says that a server does not answer."""
    return f"{target} does not answer: {error}"


def look(client: GriffinClient) -> Look:
    """Asks a server.

    Raises:
        GriffinClientError: it did not answer.
    """
    model = client.model_info(timeout=TIMEOUT_S)
    sessions = client.list_sessions(timeout=TIMEOUT_S)
    return Look(at_s=time.monotonic(), model=model, sessions=sessions)


def look_twice(target: str, interval_s: float) -> Frame:
    """What a server does in one interval.

    Raises:
        GriffinClientError: it did not answer.
    """
    with GriffinClient(target, max_retries=0) as client:
        before = look(client)
        time.sleep(interval_s)
        return Frame(target=target, activity=compare(before, look(client)))


def watch(target: str, interval_s: float, console: Console) -> None:
    """Shows a server on the terminal's other screen until Ctrl-C, and while it is gone says so.

    Raises:
        GriffinClientError: the server is there but refuses the calls; one in role prefill does.
    """
    live = Live(Text(f"asking {target}"), console=console, screen=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of live.stop
    with contextlib.suppress(KeyboardInterrupt):
        try:
            with _uninterrupted():
                live.start(refresh=True)
            while True:
                error = _follow(target, interval_s, live)
                words = f"{gone(target, error)}\nTrying again; Ctrl-C ends."
                live.update(Text(words, style="red"), refresh=True)
                time.sleep(interval_s)
        finally:
            with _uninterrupted():
                live.stop()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C and SIGTERM off: half a start or half a stop would leave the other screen up."""
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
    """Shows a server until it goes; how it went.

    Its connection ends with it: one that has failed would wait up to two minutes to try again.
    """
    before: Look | None = None
    try:
        with GriffinClient(target, max_retries=0) as client:
            while True:
                now = look(client)
                frame = Frame(target=target, activity=compare(before, now))
                live.update(frame, refresh=True)
                before = now
                time.sleep(interval_s)
    except GONE as error:
        return error
