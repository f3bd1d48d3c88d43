"""Every call has a request id: from the request, from its metadata, or a new one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import structlog

from griffin_core.errors import InvalidRequest
from griffin_server.interceptors.call import Call
from griffin_server.rpc.status import printable
from griffin_server.telemetry.audit import audit
from griffin_server.telemetry.context import REQUEST_ID_KEY, request_id_var

MAX_REQUEST_ID = 128
"""The most characters of a request id."""


@asynccontextmanager
async def identify(call: Call) -> AsyncIterator[None]:
    """Sets the request id for logs, spans and calls to other servers, and sends it to the client.

    Raises:
        InvalidRequest: the given id is too long or not printable ASCII.
    """
    request_id = _request_id(call)
    request_id_var.set(request_id)
    structlog.contextvars.bind_contextvars(request_id=request_id)
    if call.spans is not None:
        call.spans.note(request_id=request_id)
    audit().session = printable(getattr(call.request, "session_id", ""), MAX_REQUEST_ID)
    await call.context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
    yield


def _request_id(call: Call) -> str:
    given = getattr(call.request, "request_id", "")
    if not given:
        for key, value in call.context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY:
                given = value if isinstance(value, str) else value.decode(errors="replace")
    if not given:
        return uuid4().hex
    if len(given) > MAX_REQUEST_ID or not (given.isascii() and given.isprintable()):
        raise InvalidRequest(
            "request_id", given, f"at most {MAX_REQUEST_ID} printable ASCII characters"
        )
    return str(given)
