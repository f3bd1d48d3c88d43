"""The synchronous client, made from ``aio.py`` by ``make client``: edit that file."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from griffin.v1 import generation_pb2 as pb
from griffin_client import requests, responses
from griffin_client.channel import (
    ApiKey,
    Tls,
    api_key_or_default,
    channel_options,
    key_metadata,
    target_or_default,
    tls_of,
)
from griffin_client.connection import Connection
from griffin_client.errors import from_rpc_error, parsed
from griffin_client.options import (
    AnalyzeOptions,
    CallOptions,
    GenerateOptions,
    ScoreOptions,
    check_names,
)
from griffin_client.retry import Retries, check_max_retries, check_timeout
from griffin_client.tracing import trace_metadata
from griffin_client.types import Analysis, Completion, Event, ModelInfo, Score, Session, Tokens

T = TypeVar("T")


class GriffinClient:
    """Calls a Griffin server in role ``all`` or ``decode``. Safe to share between threads.

    Every method takes ``timeout``, in seconds, instead of the client's, and raises a
    ``GriffinClientError`` (see ``griffin_client.errors``) if the call fails. An unknown keyword
    raises ``TypeError``. ``griffin_client.options`` describes the keywords.

    Args:
        target: host:port, or any other name that gRPC understands. Default: the environment
            variable GRIFFIN_TARGET, else localhost:50051.
        timeout: seconds for each call, with its retries; None for no limit.
        max_retries: how often a call is tried again at most if the server cannot be reached, or
            says when it will have room. A stream is not tried again after its first event.
        api_key: says who calls: a key, or a JSON Web Token, or a function that returns the present
            one. Default: the environment variable GRIFFIN_API_KEY.
        tls: how to encrypt; see ``Tls``. Default: as the environment says, else plain text.
        channel: an existing channel to use instead of a new one; ``close`` leaves it open.

    Raises:
        InvalidArgument: ``timeout`` or ``max_retries`` is not allowed, a file of ``tls`` cannot be
            read, or the key would be sent in plain text to another machine.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = None,
        max_retries: int = 2,
        api_key: ApiKey | None = None,
        tls: Tls | None = None,
        channel: grpc.Channel | None = None,
    ) -> None:
        self.timeout = check_timeout(timeout)
        self.max_retries = check_max_retries(max_retries)
        self._owns_channel = channel is None
        self._api_key = api_key_or_default(api_key)
        if channel is not None:
            existing = channel
            self._connection = Connection[grpc.Channel](lambda _: existing, None)
            return
        where = target_or_default(target)
        options = channel_options(where)

        def make(credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
            if credentials is None:
                return grpc.insecure_channel(where, options=options)
            return grpc.secure_channel(where, credentials, options=options)

        tls = tls_of(where, tls, has_key=self._api_key is not None)
        self._connection = Connection[grpc.Channel](make, tls)

    @property
    def _stub(self) -> Any:
        return self._connection.stub

    def with_options(
        self, *, timeout: float | None = None, max_retries: int | None = None
    ) -> GriffinClient:
        """A client with other settings on the same connection, which this client still owns.

        Args:
            timeout, max_retries: as in the constructor; None keeps this client's.
        """
        other = copy.copy(self)
        other._owns_channel = False
        other.timeout = self.timeout if timeout is None else check_timeout(timeout)
        if max_retries is not None:
            other.max_retries = check_max_retries(max_retries)
        return other

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (*trace_metadata(), *key_metadata(self._api_key))

    def close(self) -> None:
        """Ends all calls and closes the connection."""
        if self._owns_channel:
            for channel in self._connection.channels():
                channel.close()

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
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """Streams the events of a completion: Started, then Tokens as they are made, then Finished.

        The call begins when the first event is asked for. Closing the iterator, or dropping it,
        cancels the call.

        Args:
            prompt: a text; or set ``messages`` or ``token_ids`` instead.
            options: see ``GenerateOptions``.
        """
        return self._events("generate", prompt, options)

    def stream_text(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[str, None, None]:
        """Streams the text of a completion, in pieces of whole characters, none of them empty.

        Args:
            prompt, options: as in ``generate``.
        """
        return _texts(self._events("stream_text", prompt, options))

    def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """Returns the whole completion at once.

        Args:
            prompt, options: as in ``generate``.
        """
        events = self._events("complete", prompt, options)
        return responses.completion([event for event in events])

    def score(
        self,
        context: str | Sequence[int],
        continuation: str | Sequence[int],
        **options: Unpack[ScoreOptions],
    ) -> Score:
        """Returns the log-probabilities of a continuation.

        Args:
            context, continuation: both text, or both token ids.
            options: see ``ScoreOptions``.
        """
        request = requests.score_request(context, options, continuation=continuation)
        return responses.score(self._call(self._stub.Score, request, options))

    def score_choices(
        self,
        context: str | Sequence[int],
        continuations: Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[ScoreOptions],
    ) -> tuple[Score, ...]:
        """Returns the log-probabilities of several continuations, such as a question's choices.

        Each is scored by itself after the same context, which is read once. It is one call.

        Args:
            context, continuations: all text, or all token ids; 1 to 256 continuations.
            options: see ``ScoreOptions``.

        Returns:
            One score for each continuation, in order.
        """
        request = requests.score_choices_request(context, options, continuations=continuations)
        return responses.scores(self._call(self._stub.Score, request, options))

    def analyze_prompt(
        self, prompt: str | None = None, **options: Unpack[AnalyzeOptions]
    ) -> Analysis:
        """Returns which neurons a prompt activates: each layer's statistic and experts.

        Nothing is generated.

        Args:
            prompt: a text; or set ``messages`` or ``token_ids`` instead.
            options: see ``AnalyzeOptions``.
        """
        request = requests.analyze_request(prompt, options)
        stream = self._stream(self._stub.AnalyzePrompt, request, options, lambda item: item)
        return responses.analysis([response for response in stream])

    def model_info(self, **options: Unpack[CallOptions]) -> ModelInfo:
        """Returns what model the server has, how it runs it, and its defaults."""
        check_names("model_info", options, CallOptions)
        request = pb.GetModelInfoRequest()
        return responses.model_info(self._call(self._stub.GetModelInfo, request, options))

    def get_session(self, session_id: str, **options: Unpack[CallOptions]) -> Session:
        """Returns a live or kept session.

        Raises:
            NotFound: no session has this id.
        """
        check_names("get_session", options, CallOptions)
        request = pb.GetSessionRequest(session_id=session_id)
        response = self._call(self._stub.GetSession, request, options)
        return responses.session(response.session)

    def list_sessions(self, **options: Unpack[CallOptions]) -> list[Session]:
        """Returns all live and kept sessions, oldest first.

        They come in pages of up to 1000; ``timeout`` holds for each page.
        """
        check_names("list_sessions", options, CallOptions)
        request, sessions = pb.ListSessionsRequest(), []
        while True:
            response = self._call(self._stub.ListSessions, request, options)
            sessions += [responses.session(item) for item in response.sessions]
            if not response.next_page_token:
                return sessions
            request.page_token = response.next_page_token

    def close_session(self, session_id: str, **options: Unpack[CallOptions]) -> None:
        """Frees a session. If it is generating, that call ends with ``Cancelled``.

        Raises:
            NotFound: no session has this id.
        """
        check_names("close_session", options, CallOptions)
        request = pb.CloseSessionRequest(session_id=session_id)
        self._call(self._stub.CloseSession, request, options)

    def _events(
        self, method: str, prompt: str | None, options: GenerateOptions
    ) -> Generator[Event, None, None]:
        """The events of a completion.

        Args:
            method: which method was called; an unknown option's error names it.
        """
        request = requests.generate_request(method, prompt, options)
        return self._stream(self._stub.Generate, request, options, responses.event)

    def _call(self, method: Any, request: Any, options: CallOptions) -> Any:
        """The response of a call, after retries if they are needed."""
        retries = Retries(self.max_retries, options.get("timeout", self.timeout))
        while True:
            try:
                response = method(request, timeout=retries.time_left_s(), metadata=self._metadata())
                return parsed(response)
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                if (wait_s := retries.wait_s(failure)) is None:
                    raise retries.reason(failure) from error
            time.sleep(wait_s)

    def _stream(
        self, method: Any, request: Any, options: CallOptions, read: Callable[[Any], T]
    ) -> Generator[T, None, None]:
        """What ``read`` makes of each message of a stream; retries come before the first message
        only."""
        retries = Retries(self.max_retries, options.get("timeout", self.timeout))
        begun = False
        while True:
            call: Any = method(request, timeout=retries.time_left_s(), metadata=self._metadata())
            try:
                for response in call:
                    begun = True
                    yield read(parsed(response))
                return
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                if begun or (wait_s := retries.wait_s(failure)) is None:
                    raise retries.reason(failure) from error
            finally:
                call.cancel()
            time.sleep(wait_s)


def _texts(events: Generator[Event, None, None]) -> Generator[str, None, None]:
    """The texts of a completion's events. Closing it closes the events, which cancels the call."""
    try:
        for event in events:
            if isinstance(event, Tokens) and event.text:
                yield event.text
    finally:
        events.close()
