"""Answers requests with a running server, which may become unreachable and return during the
run."""

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
    calibrated_fingerprint,
    scored_of,
)
from griffin_evals.errors import OtherModel, RequestRefused, ServerGone
from griffin_evals.settings import Settings

LOOK_S = 1.0
"""Seconds between two checks whether a server is reachable again."""

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

    If the server cannot be reached, or is lost during a call, the backend waits for it, with
    messages on standard error, and then repeats the calls that were not answered. If the server is
    busy, the backend retries after the time that the server asks for.

    Args:
        target: host:port, or any other gRPC name.
        concurrency: the number of calls at once.
        wait_s: the longest wait for the server, in seconds.

    Raises:
        ServerGone: the server was not reachable within that time.
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
            fingerprint=calibrated_fingerprint(
                self._info.fingerprint, self._info.calibration_digest
            ),
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
                    correction=settings.correction,
                    correction_rank=settings.correction_rank,
                    warmup_tokens=settings.warmup_tokens,
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
        """Returns the token ids of a continuation by the server's tokenizer."""
        score = self._ask(lambda: self._client.score(context, continuation, density=1.0))
        return [token.id for token in score.tokens]

    def close(self) -> None:
        self._channel.close()

    def _scores(self, item: ScoreItem, settings: Settings) -> Sequence[Score]:
        """Scores in one call, or in a call for each continuation: a text that shares a token with
        the context can only be scored alone."""
        options: dict[str, Any] = {
            "mode": settings.asked_mode,
            "density": settings.density,
            "policy": settings.policy,
            "correction": settings.correction,
            "correction_rank": settings.correction_rank,
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
        """Sends all requests, several at once. After an error it sends no more, but keeps the
        answers of running calls."""
        self._failed.clear()
        self._ask(self._look)  # the server may have been restarted between two calls
        handing_over = threading.Lock()
        errors: list[BaseException] = []

        def work(index: int) -> None:
            try:
                with _naming(items[index]):
                    answer = ask(items[index])
                    # The answer may come from another server, since gRPC reconnects silently.
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
            except BaseException:  # Ctrl-C: do not wait for a server that may hang
                self._failed.set()
                self._channel.close()
                raise
            finally:
                if errors or not all(future.done() for future in futures):
                    self._failed.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        if errors:
            raise errors[0]

    # -- a server that is lost -----------------------------------------------------------------

    def _ask(self, call: Callable[[], T]) -> T:
        """Returns the result of a call, which is repeated while the server is unreachable or busy.

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
            returns: how often the server had returned when the failed call was made.
            gone_since: when the call first failed; it may fail again on a server that answers but
                has lost its prefill server.

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
        """Returns the server's model.

        Raises:
            OtherModel: the server has another model than before.
        """
        info = self._client.model_info(timeout=INFO_TIMEOUT_S)
        before = self._info
        if before is not None and (info.fingerprint, info.calibration_digest) != (
            before.fingerprint,
            before.calibration_digest,
        ):
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
    """Makes refusals name their item."""
    try:
        yield
    except GriffinClientError as error:
        raise RequestRefused(f"{item.name}: {error}") from error
