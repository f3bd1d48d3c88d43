"""Answers from a running server, which may go away and come back during the run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from tqdm import tqdm

from griffin_client import (
    Cancelled,
    DeadlineExceeded,
    GriffinClient,
    GriffinClientError,
    InvalidArgument,
    ModelInfo,
    ResourceExhausted,
    Score,
    Unavailable,
)
from griffin_client.channel import channel_options
from griffin_evals.backend import (
    Generated,
    GenerateItem,
    ModelFacts,
    Scored,
    ScoreItem,
    Tokens,
    scored_of,
)
from griffin_evals.errors import OtherModel, RequestRefused, ServerGone
from griffin_evals.settings import Settings

LOOK_S = 1.0
"""Seconds between two checks whether a server is back."""

SAY_S = 30.0
"""Seconds between two messages about waiting."""

INFO_TIMEOUT_S = 10.0

RECONNECT_OPTIONS = [
    # By default gRPC backs off to one try every two minutes, and fails calls in between at once.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

Item = TypeVar("Item", ScoreItem, GenerateItem)
Answer = TypeVar("Answer")
T = TypeVar("T")


class RemoteBackend:
    """A server in role ``all`` or ``decode``; a ``Backend``. Items are texts or token ids.

    A server that cannot be reached, or goes away during a call, is waited for, with messages on
    standard error; then what was not answered is asked again. One that is busy is asked again when
    it says.

    Args:
        target: host:port, or any other gRPC name.
        concurrency: calls at once.
        wait_s: longest wait for the server, in seconds.

    Raises:
        ServerGone: the server did not come within that time.
    """

    def __init__(self, target: str, *, concurrency: int, wait_s: float) -> None:
        self.target = target
        self._concurrency = concurrency
        self._wait_s = wait_s
        self._channel = grpc.insecure_channel(
            target, options=[*channel_options(target), *RECONNECT_OPTIONS]
        )
        self._client = GriffinClient(channel=self._channel, max_retries=0)
        self._outage = threading.Lock()
        self._returns = 0
        self._said = float("-inf")
        self._failed = threading.Event()
        self._info: ModelInfo | None = None
        try:
            self._info = self._ask(self._look)
        except BaseException:
            self.close()
            raise
        self.facts = ModelFacts(
            name=self._info.model,
            fingerprint=self._info.fingerprint,
            dtype=self._info.dtype,
            context_length=self._info.context_length,
        )

    def score(
        self,
        items: Sequence[ScoreItem],
        settings: Settings,
        answered: Callable[[int, list[Scored]], None],
    ) -> None:
        def ask(item: ScoreItem) -> list[Scored]:
            return [scored_of(score) for score in self._scores(item, settings)]

        self._run(items, ask, answered)

    def generate(
        self,
        items: Sequence[GenerateItem],
        settings: Settings,
        answered: Callable[[int, Generated], None],
    ) -> None:
        def ask(item: GenerateItem) -> Generated:
            field = "prompt" if isinstance(item.prompt, str) else "token_ids"
            options: dict[str, Any] = {field: item.prompt, **item.sampling}
            done = self._ask(
                lambda: self._client.complete(
                    **options,
                    density=settings.density,
                    policy=settings.policy,
                    sharing=settings.sharing,
                    seed=item.seed,
                    max_tokens=item.max_tokens,
                    stop=item.stop,
                    add_special_tokens=item.special_tokens,
                )
            )
            return Generated(
                text=done.text,
                tokens=done.finished.usage.generated_tokens,
                norm_mass=done.finished.pruning.mean_norm_mass,
                cut=done.finished.reason == "context_length",
            )

        self._run(items, ask, answered)

    def continuation_ids(self, context: str, continuation: str) -> list[int]:
        """The token ids of a continuation by the server's tokenizer."""
        score = self._ask(lambda: self._client.score(context, continuation, density=1.0))
        return [token.id for token in score.tokens]

    def close(self) -> None:
        self._channel.close()

    def _scores(self, item: ScoreItem, settings: Settings) -> Sequence[Score]:
        """In one call, or in one for each continuation: a text that shares a token with the context
        can only be scored alone."""
        options: dict[str, Any] = {
            "mode": settings.asked_mode,
            "density": settings.density,
            "policy": settings.policy,
            "sharing": settings.sharing,
            "seed": item.seed,
            "add_special_tokens": item.special_tokens,
        }
        texts: Any = item.continuations
        if len(texts) > 1:
            try:
                return self._ask(lambda: self._client.score_choices(item.context, texts, **options))
            except InvalidArgument:
                if not isinstance(item.context, str):
                    raise

        def ask_alone(continuation: Tokens) -> Score:
            return self._ask(lambda: self._client.score(item.context, continuation, **options))

        return [ask_alone(continuation) for continuation in texts]

    def _run(
        self,
        items: Sequence[Item],
        ask: Callable[[Item], Answer],
        answered: Callable[[int, Answer], None],
    ) -> None:
        """Asks all, several at once. After an error no more are asked, but the answers of calls
        under way are kept."""
        self._failed.clear()
        self._ask(self._look)  # it may have been restarted while nothing was asked
        handing_over = threading.Lock()
        errors: list[BaseException] = []

        def work(index: int) -> None:
            try:
                with _naming(items[index]):
                    answer = ask(items[index])
                    # The answer may be another server's, since gRPC reconnects silently.
                    self._ask(self._look)
                with handing_over:
                    answered(index, answer)
            except BaseException as error:
                errors.append(error)
                self._failed.set()
                raise

        with ThreadPoolExecutor(self._concurrency, "griffin-eval") as pool:
            futures = [pool.submit(work, index) for index in range(len(items))]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:  # Ctrl-C: a server that hangs would never answer
                self._failed.set()
                self._channel.close()
                raise
            finally:
                if errors or not all(future.done() for future in futures):
                    self._failed.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        if errors:
            raise errors[0]

    # -- a server that goes away -----------------------------------------------------------------

    def _ask(self, call: Callable[[], T]) -> T:
        """The result of a call, which is repeated while the server is away or busy.

        Raises:
            GriffinClientError: a refusal that another try would not change.
            ServerGone, OtherModel: see ``_await_return``.
        """
        gone_since: float | None = None
        while True:
            returns = self._returns
            try:
                return call()
            except ResourceExhausted as error:
                self._say(f"{self.target} is busy ({error.message})")
                if error.retry_after_s is None or self._failed.wait(error.retry_after_s):
                    raise
            except (Unavailable, Cancelled, DeadlineExceeded) as error:
                gone_since = gone_since or time.monotonic()
                self._await_return(returns, gone_since, error)

    def _await_return(self, returns: int, gone_since: float, error: GriffinClientError) -> None:
        """Waits until the server answers again, on behalf of all calls that failed meanwhile.

        Args:
            returns: how often the server had come back when the call that failed was made.
            gone_since: when the call failed first; it may do so again with a server that answers,
                whose prefill server is gone.

        Raises:
            ServerGone: it took longer than ``wait_s``.
            OtherModel: it came back with another model.
            GriffinClientError: ``error``; the run has failed meanwhile.
        """
        with self._outage:
            while returns == self._returns:
                if self._failed.is_set():
                    raise error
                waited = time.monotonic() - gone_since
                if waited >= self._wait_s:
                    self._failed.set()
                    raise ServerGone(
                        f"{self.target} cannot be reached; waited {waited:.0f} s: {error}"
                    ) from error
                self._say(f"waiting for {self.target} ({error.message})")
                if self._failed.wait(min(LOOK_S, self._wait_s - waited)):
                    raise error
                try:
                    self._look()
                except (Unavailable, Cancelled, DeadlineExceeded) as still:
                    error = still
                else:
                    self._returns += 1

    def _look(self) -> ModelInfo:
        """The server's model.

        Raises:
            OtherModel: it is not what it held before.
        """
        info = self._client.model_info(timeout=INFO_TIMEOUT_S)
        if (before := self._info) is not None and info.fingerprint != before.fingerprint:
            self._failed.set()
            raise OtherModel(
                f"{self.target} now holds {info.model} ({info.fingerprint}); this run began with "
                f"{before.model} ({before.fingerprint})"
            )
        return info

    def _say(self, words: str) -> None:
        """Writes a line to standard error, at most one in ``SAY_S`` seconds, not into a bar."""
        if time.monotonic() - self._said >= SAY_S:
            self._said = time.monotonic()
            tqdm.write(words, file=sys.stderr)


@contextmanager
def _naming(item: ScoreItem | GenerateItem) -> Iterator[None]:
    """Makes refusals name the item that they are about."""
    try:
        yield
    except GriffinClientError as error:
        raise RequestRefused(f"{item.name}: {error}") from error
