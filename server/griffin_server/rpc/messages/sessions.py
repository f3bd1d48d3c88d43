"""Sessions of the core to messages, and the pages of ListSessions."""

from __future__ import annotations

import secrets
from base64 import b64decode, urlsafe_b64encode

from griffin.v1 import generation_pb2 as pb
from griffin_core.engine.session import SessionInfo
from griffin_core.errors import InvalidRequest
from griffin_server.rpc.messages.enums import STATES_TO_PB
from griffin_server.rpc.messages.responses import figures_to_pb

MOST_SESSIONS_LISTED = 1000
"""The most sessions in a page of ListSessions, about 250 KB."""


def session_to_pb(info: SessionInfo) -> pb.Session:
    return pb.Session(
        session_id=info.session_id,
        state=STATES_TO_PB[info.state],
        context_tokens=info.context_tokens,
        generated_tokens=info.generated_tokens,
        pruning=figures_to_pb(info.pruning),
        age_s=info.age_s,
        idle_s=info.idle_s,
        reserved_bytes=info.reserved_bytes,
        owner=info.owner,
    )


class PageTokens:
    """Page tokens of ListSessions. They are opaque to clients, and other servers refuse them.

    A token holds random bytes that this server made at its start, and the last position of a page.
    """

    def __init__(self) -> None:
        self._server = secrets.token_bytes(8)

    def write(self, last: int | None) -> str:
        """The token of the page that follows position ``last``; empty if None."""
        if last is None:
            return ""
        return urlsafe_b64encode(self._server + last.to_bytes(8)).decode()

    def read(self, token: str) -> int:
        """The position that the token's page follows; 0 for the empty token.

        Raises:
            InvalidRequest: this server did not make the token.
        """
        if not token:
            return 0
        try:
            raw = b64decode(token, altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        if len(raw) != 16 or raw[:8] != self._server:
            raise InvalidRequest(
                "page_token", token, "empty, or the next_page_token of the page before"
            )
        return int.from_bytes(raw[8:])


def page_size(request: pb.ListSessionsRequest) -> int:
    """The most sessions that the requested page may have.

    Raises:
        InvalidRequest: it is out of range.
    """
    if not request.HasField("page_size"):
        return MOST_SESSIONS_LISTED
    if not 1 <= request.page_size <= MOST_SESSIONS_LISTED:
        raise InvalidRequest("page_size", request.page_size, f"[1, {MOST_SESSIONS_LISTED}]")
    return request.page_size
