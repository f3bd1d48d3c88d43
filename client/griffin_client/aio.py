"""The asynchronous client: the synchronous one's methods, awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_client import convert
from griffin_client.client import channel_options
from griffin_client.errors import from_rpc_error
from griffin_client.tracing import trace_metadata
from griffin_client.types import (
    Analysis,
    Completion,
    Event,
    Message,
    ModelInfo,
    Policy,
    Sampling,
    Score,
    ScoreMode,
    Session,
    Sharing,
    Stopping,
)


class AsyncGriffinClient:
    """``GriffinClient`` for asyncio; arguments and errors are the same.

    Args:
        target: host:port, or any other gRPC name.
        channel: an existing channel to use instead; it is not closed then.
    """

    def __init__(
        self, target: str = "localhost:50051", *, channel: grpc.aio.Channel | None = None
    ) -> None:
        self._owns_channel = channel is None
        self._channel = channel or grpc.aio.insecure_channel(
            target, options=channel_options(target)
        )
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def close(self) -> None:
        """Ends all calls and the connection."""
        if self._owns_channel:
            await self._channel.close()

    async def __aenter__(self) -> AsyncGriffinClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Message | tuple[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        density: float | None = None,
        policy: Policy | None = None,
        sharing: Sharing | None = None,
        sampling: Sampling | None = None,
        stopping: Stopping | None = None,
        top_logprobs: int | None = None,
        session_id: str | None = None,
        keep_session: bool = False,
        request_id: str | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """See ``GriffinClient.generate``. Closing the iterator cancels the call."""
        request = convert.generate_request(
            prompt,
            messages=messages,
            token_ids=token_ids,
            density=density,
            policy=policy,
            sharing=sharing,
            sampling=sampling or Sampling(),
            stopping=stopping or Stopping(),
            top_logprobs=top_logprobs,
            session_id=session_id,
            keep_session=keep_session,
            request_id=request_id,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            add_special_tokens=add_special_tokens,
        )
        call: Any = self._stub.Generate(request, timeout=timeout_s, metadata=trace_metadata())
        try:
            async for response in call:
                yield convert.event(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def complete(self, prompt: str | None = None, **options: Any) -> Completion:
        """See ``GriffinClient.complete``."""
        return convert.completion([item async for item in self.generate(prompt, **options)])

    async def score(
        self,
        context: str | Sequence[int],
        continuation: str | Sequence[int],
        *,
        mode: ScoreMode | None = None,
        density: float | None = None,
        policy: Policy | None = None,
        sharing: Sharing | None = None,
        seed: int | None = None,
        request_id: str | None = None,
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> Score:
        """See ``GriffinClient.score``."""
        request = convert.score_request(
            context,
            continuation=continuation,
            mode=mode,
            density=density,
            policy=policy,
            sharing=sharing,
            seed=seed,
            request_id=request_id,
            add_special_tokens=add_special_tokens,
        )
        return convert.score(await self._call(self._stub.Score, request, timeout_s))

    async def score_choices(
        self,
        context: str | Sequence[int],
        continuations: Sequence[str] | Sequence[Sequence[int]],
        *,
        mode: ScoreMode | None = None,
        density: float | None = None,
        policy: Policy | None = None,
        sharing: Sharing | None = None,
        seed: int | None = None,
        request_id: str | None = None,
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Score, ...]:
        """See ``GriffinClient.score_choices``."""
        request = convert.score_request(
            context,
            continuations=continuations,
            mode=mode,
            density=density,
            policy=policy,
            sharing=sharing,
            seed=seed,
            request_id=request_id,
            add_special_tokens=add_special_tokens,
        )
        return convert.scores(await self._call(self._stub.Score, request, timeout_s))

    async def analyze_prompt(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Message | tuple[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        density: float | None = None,
        policy: Policy | None = None,
        seed: int | None = None,
        activation_layers: Sequence[int] = (),
        request_id: str | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> Analysis:
        """See ``GriffinClient.analyze_prompt``."""
        request = convert.analyze_request(
            prompt,
            messages=messages,
            token_ids=token_ids,
            density=density,
            policy=policy,
            seed=seed,
            activation_layers=activation_layers,
            request_id=request_id,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            add_special_tokens=add_special_tokens,
        )
        call: Any = self._stub.AnalyzePrompt(request, timeout=timeout_s, metadata=trace_metadata())
        try:
            return convert.analysis([response async for response in call])
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """See ``GriffinClient.model_info``."""
        request = pb.GetModelInfoRequest()
        return convert.model_info(await self._call(self._stub.GetModelInfo, request, timeout_s))

    async def get_session(self, session_id: str, *, timeout_s: float | None = None) -> Session:
        """See ``GriffinClient.get_session``."""
        request = pb.GetSessionRequest(session_id=session_id)
        return convert.session(
            (await self._call(self._stub.GetSession, request, timeout_s)).session
        )

    async def list_sessions(self, *, timeout_s: float | None = None) -> list[Session]:
        """See ``GriffinClient.list_sessions``."""
        request, sessions = pb.ListSessionsRequest(), []
        while True:
            response = await self._call(self._stub.ListSessions, request, timeout_s)
            sessions += [convert.session(item) for item in response.sessions]
            if not response.next_page_token:
                return sessions
            request.page_token = response.next_page_token

    async def close_session(self, session_id: str, *, timeout_s: float | None = None) -> None:
        """See ``GriffinClient.close_session``."""
        request = pb.CloseSessionRequest(session_id=session_id)
        await self._call(self._stub.CloseSession, request, timeout_s)

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return await method(request, timeout=timeout_s, metadata=trace_metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
