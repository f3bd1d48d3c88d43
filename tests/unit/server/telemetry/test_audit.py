"""The log says of each call who made it, about what and how much, and nothing of what was said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from griffin_client import GriffinClient, GriffinClientError
from griffin_core.model.load import Model
from griffin_server.security.api_keys import line_of
from tests.servers import eventually, running

KEY = f"griffin-{'alice':.>43}"
SECRET = "kumquat"  # what the prompts say


def calls(logs: Any) -> list[dict[str, Any]]:
    return [entry for entry in logs if entry["event"] == "call"]


def test_each_call_is_audited(tiny: Callable[[str], Model], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line_of(KEY, "alice"))
    with (
        running(tiny("llama"), api_keys=tmp_path / "keys") as server,
        GriffinClient(server.target, api_key=KEY, max_retries=0) as client,
        capture_logs() as logs,
    ):
        done = client.complete(SECRET, max_tokens=5, ignore_eos=True, keep_session=True)
        session = done.started.session_id
        client.complete(SECRET, max_tokens=1, session_id=session, keep_session=True)
        client.score(SECRET, SECRET)
        client.close_session(session)
        with pytest.raises(GriffinClientError):
            client.get_session(f"{session}\n[error] forged")
        stranger = GriffinClient(server.target, max_retries=0)
        with stranger, pytest.raises(GriffinClientError):
            stranger.complete(SECRET)
        eventually(lambda: len(calls(logs)) == 6)
    first, second, score, close, missed, refused = calls(logs)
    for entry in (first, second, score, close, missed):
        assert entry["principal"] == "alice"
        assert entry["request_bytes"] > 0 and entry["peer"].startswith("ipv4:127.0.0.1:")
    assert first["session"] == second["session"] == close["session"] == session
    assert (first["code"], first["generated_tokens"]) == ("OK", 5)
    assert first["prompt_tokens"] >= len(SECRET)  # a token is a byte
    assert first["response_bytes"] > 50
    assert score["prompt_tokens"] >= len(SECRET)
    assert missed["code"] == "NOT_FOUND" and "\n" not in missed["session"]
    assert refused["code"] == "UNAUTHENTICATED" and refused["principal"] is None
    assert "session" not in refused and "prompt_tokens" not in refused
    assert SECRET not in str(logs)


def test_a_handoff_is_audited_on_its_server(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    with (
        running(model, role="prefill") as prefill,
        running(model, role="decode", prefill_target=prefill.target) as decode,
        decode.client() as client,
        capture_logs() as logs,
    ):
        client.complete(token_ids=[1] * 20, max_tokens=1)
        eventually(lambda: len(calls(logs)) == 2)
    by_method = {entry["method"].rpartition("/")[2]: entry for entry in calls(logs)}
    assert by_method["Prefill"]["prompt_tokens"] == 20
    assert by_method["Prefill"]["response_bytes"] > 1000
