"""Sessions belong to the caller that opened them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from griffin_client import GriffinClient, NotFound
from griffin_core.model.load import Model
from griffin_server.security.api_keys import line_of, new_key
from tests.servers import Running, running

KEYS = {name: new_key() for name in ("alice", "bob", "oncall", "named")}


@pytest.fixture(scope="module")
def server(
    tiny: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    groups = {"oncall": ("operator",)}
    keys.write_text("\n".join(line_of(k, n, groups.get(n, ())) for n, k in KEYS.items()))
    with running(
        tiny("llama"), api_keys=keys, operators="named", density=0.5, sharing="shared"
    ) as server:
        yield server


@contextlib.contextmanager
def clients(server: Running) -> Iterator[dict[str, GriffinClient]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(GriffinClient(server.target, api_key=key, max_retries=0))
            for name, key in KEYS.items()
        }


def kept(client: GriffinClient, prompt: str = "a secret") -> str:
    made = client.complete(prompt, max_tokens=2, ignore_eos=True, keep_session=True)
    assert made.finished.session_kept
    return made.started.session_id


def error_of(call: Callable[[], Any]) -> NotFound:
    with pytest.raises(NotFound) as caught:
        call()
    return caught.value


def test_others_see_nothing_of_a_session(server: Running) -> None:
    with clients(server) as by:
        alice, bob = by["alice"], by["bob"]
        mine = kept(alice)
        assert [one.session_id for one in alice.list_sessions()] == [mine]
        assert list(bob.list_sessions()) == []
        never = "0" * len(mine)
        for call in (
            bob.get_session,
            bob.close_session,
            lambda name: bob.complete("b", session_id=name, max_tokens=1),
        ):
            wrong, missing = (error_of(partial(call, name)) for name in (mine, never))
            assert wrong.message.replace(mine, never) == missing.message
            assert (wrong.code, wrong.reason) == (missing.code, missing.reason)
        later = alice.complete("more", session_id=mine, max_tokens=1, keep_session=True)
        assert later.finished.session_kept
        alice.close_session(mine)
        gone = error_of(lambda: alice.get_session(mine))
        assert "closed" in gone.message
        assert "closed" not in error_of(lambda: bob.get_session(mine)).message


def test_a_running_stream_cannot_be_ended_by_others(server: Running) -> None:
    with clients(server) as by:
        stream = by["alice"].generate("a", max_tokens=150, ignore_eos=True)
        started: Any = next(stream)
        error_of(lambda: by["bob"].close_session(started.session_id))
        assert list(stream)[-1].reason == "max_tokens"  # type: ignore[union-attr]


@pytest.mark.parametrize("operator", ["oncall", "named"])
def test_operators_see_and_close_everybodys_sessions(server: Running, operator: str) -> None:
    with clients(server) as by:
        sessions = {kept(by[name]): name for name in ("alice", "bob", operator)}
        seen = {one.session_id: one.owner for one in by[operator].list_sessions()}
        assert seen == sessions
        for session, name in sessions.items():
            assert by[operator].get_session(session).owner == name
        for session, name in sessions.items():
            if name != operator:  # to read is to run the owner's tokens: nobody else does
                error_of(lambda s=session: by[operator].complete("x", session_id=s, max_tokens=1))  # type: ignore[misc]
            by[operator].close_session(session)
        assert list(by[operator].list_sessions()) == []


def test_pages_hold_the_callers_sessions_alone(server: Running) -> None:
    with clients(server) as by:
        mine = []
        for number in range(5):
            mine.append(kept(by["alice"], f"a{number}"))
            kept(by["bob"], f"b{number}")
        assert [one.session_id for one in by["alice"].list_sessions()] == mine
        for name in ("alice", "bob"):
            for session in list(by[name].list_sessions()):
                by[name].close_session(session.session_id)


def test_a_session_of_another_takes_as_long_as_none(server: Running) -> None:
    """Both come of one look-up. The bound is wide: this is no measurement."""
    with clients(server) as by:
        mine = kept(by["alice"])
        times: dict[str, list[float]] = {mine: [], "0" * len(mine): []}
        for _ in range(50):
            for name, taken in times.items():
                clock = time.perf_counter()
                error_of(lambda name=name: by["bob"].get_session(name))  # type: ignore[misc]
                taken.append(time.perf_counter() - clock)
        theirs, none = (statistics.median(taken) for taken in times.values())
        assert abs(theirs - none) < 2e-3
        by["alice"].close_session(mine)


@pytest.mark.parametrize("across", [False, True])
def test_groups_and_views_are_shared_within_one_owner(
    across: bool, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("\n".join(line_of(k, n) for n, k in KEYS.items()))
    with (
        running(
            tiny("llama"),
            api_keys=tmp_path / "keys",
            density=0.5,
            sharing="shared",
            share_across_owners=across,
        ) as server,
        clients(server) as by,
    ):
        streams = [
            by[name].generate("the same", max_tokens=200, ignore_eos=True)
            for name in ("alice", "alice", "bob")
        ]
        for stream in streams:
            for _ in range(3):
                next(stream)
        groups = server.app.engine.snapshot().result(10).groups.shared
        assert sorted(len(group.members) for group in groups) == ([3] if across else [1, 2])
        for stream in streams:
            stream.close()
