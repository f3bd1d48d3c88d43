"""Sessions of the core to messages, and the pages of ListSessions."""

from __future__ import annotations

import secrets
from base64 import b64decode, urlsafe_b64encode

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

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


NONCE_BYTES = 12


class PageTokens:
    """Page tokens of ListSessions. Other servers refuse them.

    A token holds the last position of a page. It is encrypted, because positions count everybody's
    sessions, by a key that this server made at its start.
    """

    def __init__(self) -> None:
        self._cipher = AESGCM(AESGCM.generate_key(128))

    def write(self, last: int | None) -> str:
        """The token of the page that follows position ``last``; empty if None."""
        if last is None:
            return ""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return urlsafe_b64encode(
            nonce + self._cipher.encrypt(nonce, last.to_bytes(8), None)
        ).decode()

    def read(self, token: str) -> int:
        """The position that the token's page follows; 0 for the empty token.

        Raises:
            InvalidRequest: this server did not make the token.
        """
        if not token:
            return 0
        try:
            raw = b64decode(token, altchars=b"-_", validate=True)
            last = self._cipher.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], None)
        except (ValueError, InvalidTag):
            raise InvalidRequest(
                "page_token", token, "empty, or the next_page_token of the page before"
            ) from None
        return int.from_bytes(last)


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
