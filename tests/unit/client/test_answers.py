"""What a client makes of answers that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from griffin_client import AsyncGriffinClient, GriffinClient, ServerFault

CALLS: dict[str, Callable[[Any], Any]] = {
    "complete": lambda client: client.complete("Hello"),
    "score": lambda client: client.score("Hello", " world"),
    "analyze_prompt": lambda client: client.analyze_prompt("Hello"),
    "model_info": lambda client: client.model_info(),
    "get_session": lambda client: client.get_session("one"),
    "list_sessions": lambda client: client.list_sessions(),
    "close_session": lambda client: client.close_session("one"),
}


class Nonsense(grpc.GenericRpcHandler):
    """Answers each call with a byte that is no message."""

    def service(self, call: Any) -> Any:
        if call.method.endswith(("/Generate", "/AnalyzePrompt")):
            return grpc.unary_stream_rpc_method_handler(lambda *_: iter([b"\xff"]))
        return grpc.unary_unary_rpc_method_handler(lambda *_: b"\xff")


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Nonsense()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_bytes_that_are_no_message_are_a_fault_of_the_server(
    target: str, call: Callable[[Any], Any]
) -> None:
    with GriffinClient(target) as client, pytest.raises(ServerFault, match="INTERNAL"):
        call(client)
    async with AsyncGriffinClient(target) as client:
        with pytest.raises(ServerFault, match="INTERNAL"):
            await call(client)
