"""The request id of the call that is being served: for logs, and for calls to other servers."""

from __future__ import annotations

from contextvars import ContextVar

REQUEST_ID_KEY = "x-request-id"
"""The metadata key of a request id."""

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
