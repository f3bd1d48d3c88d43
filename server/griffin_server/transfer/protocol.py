"""The version of the protocol between decode and prefill servers.

Each side says which versions it understands, and the newest common one is spoken, so that two
releases can hand off to each other. A server before Griffin 0.2 sends no version, which reads as 0.
"""

from __future__ import annotations

from griffin.v1 import prefill_pb2 as pb
from griffin_core.errors import ProtocolMismatch

OLDEST, NEWEST = 3, 3
"""The versions that this build understands. Version 3: layers come with three sums and may have a
correction, and the prompt decides how many experts each of them has."""


def negotiate(request: pb.PrefillRequest) -> int:
    """The version in which a prefill server answers.

    Raises:
        ProtocolMismatch: the caller understands none that this build does.
    """
    version = min(NEWEST, request.newest_protocol_version)
    if version < max(OLDEST, request.oldest_protocol_version):
        raise ProtocolMismatch(
            "protocol_version: decode understands "
            f"{_span(request.oldest_protocol_version, request.newest_protocol_version)}, prefill "
            f"{_span(OLDEST, NEWEST)}; run releases on both sides that have one in common"
        )
    return version


def check_answer(header: pb.PrefillHeader) -> None:
    """Refuses a handoff in a version that was not asked for.

    Raises:
        ProtocolMismatch: naming it.
    """
    if not OLDEST <= header.protocol_version <= NEWEST:
        raise ProtocolMismatch(
            f"protocol_version: prefill answers in {header.protocol_version}, decode understands "
            f"{_span(OLDEST, NEWEST)}; run releases on both sides that have one in common"
        )


def _span(oldest: int, newest: int) -> str:
    return f"{newest}" if oldest == newest else f"{oldest} to {newest}"
