"""The synchronous client."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_client import convert
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

T = TypeVar("T")

CHANNEL_OPTIONS = [
    # A connection that has died, in a call or between two, is noticed within half a minute. Griffin
    # servers let idle clients ping.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]

LOOPBACK = re.compile(r"(dns:(///)?)?(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")


def channel_options(target: str) -> list[tuple[str, int]]:
    """Options of a channel. A server on this machine is not called by way of the proxy that the
    environment names for others, as gRPC would do it."""
    if LOOPBACK.fullmatch(target):
        return [*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)]
    return CHANNEL_OPTIONS


class GriffinClient:
    """Calls a Griffin server in role ``all`` or ``decode``. Safe to share between threads.

    Every method takes ``timeout_s``: seconds for the whole call, None for no limit. Every method
    raises a GriffinClientError (see ``griffin_client.errors``) if the call fails.

    Args:
        target: host:port, or any other gRPC name.
        channel: an existing channel to use instead; it is not closed then.
    """

    def __init__(
        self, target: str = "localhost:50051", *, channel: grpc.Channel | None = None
    ) -> None:
        self._owns_channel = channel is None
        self._channel = channel or grpc.insecure_channel(target, options=channel_options(target))
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def close(self) -> None:
        """Ends all calls and the connection."""
        if self._owns_channel:
            self._channel.close()

    def __enter__(self) -> GriffinClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def generate(
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
    ) -> Iterator[Event]:
        """Streams a completion: Started, then Tokens as they are made, then Finished.

        Closing the iterator, or leaving it to the garbage collector, cancels the call.

        Args:
            prompt, messages, token_ids: exactly one of them; messages are ``Message``s or
                (role, content) pairs.
            density: fraction of FF neurons generation runs on, in (0, 1]; None takes the server's.
            policy: how they are chosen; None takes the server's.
            sharing: "private" for a set of experts of its own, "shared" for one with other
                sessions, "auto" for whatever costs least at the time, which may be all neurons:
                ``Finished.pruning`` says what the tokens ran on. None takes the server's.
            top_logprobs: how many alternatives to report at each token; None for no
                log-probabilities at all.
            session_id: a kept session to continue.
            keep_session: keep the session for a next turn.
            continue_final_message: go on with the text of the last message instead of answering it.
            chat_template_kwargs: further variables of the chat template, such as
                ``{"enable_thinking": False}`` or ``tools``; what JSON can hold.
            add_special_tokens: whether a text prompt gets the tokenizer's own BOS and the like;
                None for True.
        """
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
        return self._stream(self._stub.Generate, request, timeout_s, convert.event)

    def _stream(
        self, method: Any, request: Any, timeout_s: float | None, read: Callable[[Any], T]
    ) -> Iterator[T]:
        call: Any = method(request, timeout=timeout_s, metadata=trace_metadata())
        try:
            for response in call:
                yield read(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    def complete(self, prompt: str | None = None, **options: Any) -> Completion:
        """The whole completion at once. Takes what ``generate`` takes."""
        return convert.completion(self.generate(prompt, **options))

    def score(
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
        """Log-probabilities of a continuation.

        Args:
            context, continuation: both text, or both token ids.
            mode: "generation": the context chooses the experts, and each token of the continuation
                runs on them, as if it were generated. "classification": every token that is run
                chooses, and the last of them alone runs on the experts; see ``ScoreMode`` in
                generation.proto. None takes "generation".
            add_special_tokens: as in ``generate``, of the context.
        """
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
        return convert.score(self._call(self._stub.Score, request, timeout_s))

    def score_choices(
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
        """Log-probabilities of several continuations, such as the choices of a question, each by
        itself after the same context, which is read once. It is one call.

        Args:
            context, continuations: all text, or all token ids; 1 to 256 continuations.
            mode, add_special_tokens: as in ``score``.

        Returns:
            One for each continuation, in order.
        """
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
        return convert.scores(self._call(self._stub.Score, request, timeout_s))

    def analyze_prompt(
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
        """What a prompt fires: each layer's statistic and experts. Nothing is generated.

        Args:
            prompt, messages, token_ids: exactly one of them, as in ``generate``.
            density, policy: of the experts; None takes the server's.
            activation_layers: layers of which each token's activations are wanted, at most 8.
            continue_final_message, chat_template_kwargs, add_special_tokens: as in ``generate``.
        """
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
        responses = self._stream(self._stub.AnalyzePrompt, request, timeout_s, lambda item: item)
        return convert.analysis(responses)

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What model the server holds and how it runs it."""
        request = pb.GetModelInfoRequest()
        return convert.model_info(self._call(self._stub.GetModelInfo, request, timeout_s))

    def get_session(self, session_id: str, *, timeout_s: float | None = None) -> Session:
        """A live or kept session."""
        request = pb.GetSessionRequest(session_id=session_id)
        response = self._call(self._stub.GetSession, request, timeout_s)
        return convert.session(response.session)

    def list_sessions(self, *, timeout_s: float | None = None) -> list[Session]:
        """All live or kept sessions, oldest first. ``timeout_s`` is for each page of them."""
        request, sessions = pb.ListSessionsRequest(), []
        while True:
            response = self._call(self._stub.ListSessions, request, timeout_s)
            sessions += [convert.session(item) for item in response.sessions]
            if not response.next_page_token:
                return sessions
            request.page_token = response.next_page_token

    def close_session(self, session_id: str, *, timeout_s: float | None = None) -> None:
        """Frees a session; one that is generating ends with Cancelled."""
        self._call(
            self._stub.CloseSession, pb.CloseSessionRequest(session_id=session_id), timeout_s
        )

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=trace_metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
