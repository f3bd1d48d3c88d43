"""A turn that generates tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_core.backends.base import Layout
from griffin_core.backends.transfers import on_device
from griffin_core.engine.after_stop import tokens_after_stop
from griffin_core.engine.events import Finished, SpeculationFigures, Timings, TokensMade
from griffin_core.engine.session import Session
from griffin_core.engine.task import GenerateTask
from griffin_core.errors import NonFiniteLogits
from griffin_core.forward.draws import Drawn
from griffin_core.model.load import Model
from griffin_core.sampling.bans import Bans
from griffin_core.sampling.drafting import Drafting
from griffin_core.sampling.logprobs import Logprobs
from griffin_core.sampling.sampler import Sampler
from griffin_core.sampling.speculation import NO_SPECULATION, SpeculationParams
from griffin_core.sampling.stopping import FinishReason, StopChecker

IMMEDIATE_STREAMS = 4
"""About how many streams emit tokens in one step, unless the number of tokens is fixed."""

MAX_HELD_TOKENS = 4
"""Most tokens that a stream holds back before it emits them together."""


class FlushPolicy:
    """After how many new tokens a stream emits them, except for its first token, which it emits at
    once. There is one policy for all streams of an engine.

    A message costs server and client the same with one token as with four, and that time is taken
    from the steps where they share CPUs (ADR 12).

    Args:
        interval: number of tokens; None for one while there are few streams, and for more while
            there are many.
    """

    def __init__(self, interval: int | None) -> None:
        self._fixed = interval
        self.tokens = interval or 1

    def set(self, *, streams: int, prompts: bool) -> None:
        """Settles the number of tokens for the next step.

        Args:
            streams: number of streams in the step.
            prompts: whether passes over prompts come between steps. Tokens then wait long enough.
        """
        if self._fixed is None:
            crowded = 1 if prompts else math.ceil(streams / IMMEDIATE_STREAMS)
            self.tokens = min(max(1, crowded), MAX_HELD_TOKENS)


class Generation:
    """A ``Turn`` that generates: it takes drawn tokens, emits them, and says when it ends.

    Args:
        flush_policy: when tokens are emitted.
        speculation: how tokens are drafted.

    Raises:
        InvalidRequest: the request bans every token.
    """

    layout: Layout = "gemv"
    chooses = False

    def __init__(
        self,
        model: Model,
        task: GenerateTask,
        flush_policy: FlushPolicy,
        speculation: SpeculationParams = NO_SPECULATION,
    ) -> None:
        self._model = model
        self._flush_policy = flush_policy
        self._stopping = task.stopping
        self.sampling = task.sampling
        self.top_logprobs = task.top_logprobs
        self.drafting = Drafting(speculation, (), frozenset())
        vocab_size = model.decoder.spec.vocab_size
        self._bans = Bans(task.sampling, task.stopping, model.eos_ids, vocab_size)
        self._banned: frozenset[int] = frozenset()
        self._ids: list[int] = []
        self._text = ""
        self._logprobs: list[Logprobs] = []

    def begin(self, session: Session) -> None:
        """Called once the prompt has been read."""
        self._checker = StopChecker(
            self._stopping,
            self._model.tokenizer,
            self._model.eos_ids,
            before=session.tokens,
            room=self._model.decoder.spec.context_length - len(session.tokens),
        )
        ends = self._stopping.stop_token_ids
        ends = ends if self._stopping.ignore_eos else ends | self._model.eos_ids
        self.drafting = Drafting(self.drafting.params, session.tokens, ends)

    @property
    def remaining(self) -> int:
        """The most tokens that may still be drawn."""
        return self._checker.remaining

    def wants(self, session: Session) -> bool:
        """Whether another token may be drawn. Tokens in flight count, although it is not known yet
        what they are; a token that may be banned because of them waits for them."""
        if self._bans.lookback and session.in_flight:
            return False
        return self._checker.remaining > session.in_flight

    def draws_alike(self, session: Session) -> bool:
        """Whether what may be drawn from now on does not depend on the tokens before."""
        past_minimum = session.turn_generated >= self._stopping.min_tokens
        return past_minimum and not self._bans.lookback and not self.sampling.penalizes

    def ban(self, session: Session, sampler: Sampler, ahead: Sequence[int] = ()) -> None:
        """Tells the sampler which tokens the next one must not be, before it is drawn.

        Args:
            ahead: tokens that were drawn since the session's last one.

        Raises:
            InvalidRequest: no token is left.
        """
        assert session.slot is not None
        position = session.turn_generated + session.in_flight + len(ahead)
        known = min(self._bans.lookback, session.turn_generated)
        before = (*session.tokens[len(session.tokens) - known :], *ahead)
        banned = self._bans.at(position, before)
        self._ban(session.slot, sampler, banned)

    def redraw(self, session: Session, sampler: Sampler, logits: Tensor) -> list[int]:
        """Returns what the last tokens would have been with other logits: each is drawn by its own
        seed and position after the tokens that are there, and nothing of it is kept.

        Args:
            logits: [n, V] float32, for the last n tokens.
        """
        assert session.slot is not None
        begin = len(session.tokens) - len(logits)
        made = session.tokens[begin:]
        places = range(session.turn_generated - len(made), session.turn_generated)
        alike = self.draws_alike(session) and places[0] >= self._stopping.min_tokens
        runs = [range(len(made))] if alike else [range(n, n + 1) for n in range(len(made))]
        drawn: list[int] = []
        sampler.count(session.slot, made, -1)
        for run in runs:
            known = min(self._bans.lookback, places[run[0]])
            before = session.tokens[begin + run[0] - known : begin + run[0]]
            self._ban(session.slot, sampler, self._bans.at(places[run[0]], before))
            device = logits.device
            tokens = sampler.sample(
                logits[run[0] : run[-1] + 1],
                on_device([session.slot] * len(run), torch.int64, device),
                on_device([begin + n for n in run], torch.int64, device),
            ).tolist()
            sampler.count(session.slot, [token for token in tokens if token >= 0], -1)
            sampler.count(session.slot, made[run[0] : run[-1] + 1], 1)
            drawn += tokens
        return drawn

    def _ban(self, slot: int, sampler: Sampler, banned: frozenset[int]) -> None:
        if banned != self._banned:
            sampler.ban(slot, sorted(banned))
            self._banned = banned

    def take(self, session: Session, drawn: Drawn) -> Finished | None:
        """Takes the next token. Returns the turn's last event when it ends with that token.

        Raises:
            NonFiniteLogits: none could be drawn.
        """
        token = drawn.token
        if token < 0:
            raise NonFiniteLogits(position=len(session.tokens))
        if drawn.logprobs is not None:
            self._logprobs.append(drawn.logprobs)
        text, reason = self._checker.push(token)
        self._ids.append(token)
        self._text += text
        session.tokens.append(token)
        self.drafting.push(token)
        session.generated_tokens += 1
        session.turn_generated += 1
        session.clock.last_token = time.monotonic()
        session.clock.first_token = session.clock.first_token or session.clock.last_token
        first = session.turn_generated == 1
        if first or reason is not None or len(self._ids) >= self._flush_policy.tokens:
            self._emit(session)
        if reason is None:
            return None
        self._truncate(session, reason)
        return self._finished(session, reason)

    def _truncate(self, session: Session, reason: FinishReason) -> None:
        """Leaves in the session what its client has seen, and in its cache those of these tokens
        that were run. The last one counts as not run, even if a step too many has run it or a stop
        string came after it: so a session is the same whatever has ended its turn."""
        assert session.cache is not None
        begin = len(session.tokens) - session.turn_generated
        kept = session.turn_generated
        if session.keep and reason is FinishReason.STOP_SEQUENCE:
            kept, replaced = tokens_after_stop(
                self._model.tokenizer,
                session.tokens[:begin],
                session.tokens[begin:],
                self._checker,
                vocab_size=self._model.decoder.spec.vocab_size,
                skip_special_tokens=self._stopping.skip_special_tokens,
            )
            session.tokens[begin + kept :] = replaced
        session.cache.rewind(max(begin, min(begin + kept, len(session.tokens) - 1)))

    def flush(self, session: Session) -> None:
        """Emits the tokens that are held back."""
        if self._ids:
            self._emit(session)

    def _emit(self, session: Session) -> None:
        session.sink.put(
            TokensMade(ids=tuple(self._ids), text=self._text, logprobs=tuple(self._logprobs))
        )
        self._ids, self._text, self._logprobs = [], "", []

    def _finished(self, session: Session, reason: FinishReason) -> Finished:
        clock = session.clock
        return Finished(
            reason=reason,
            stop=self._checker.matched,
            prompt_tokens=session.prompt_tokens,
            generated_tokens=session.turn_generated,
            context_tokens=len(session.tokens),
            timings=Timings(
                queue_s=clock.admitted - clock.arrived,
                prefill_s=clock.prefilled - clock.admitted,
                selection_s=clock.selection_s,
                slim_build_s=max(0.0, clock.view_ready - clock.prefilled),
                first_token_s=clock.first_token - clock.arrived,
                decode_s=clock.last_token - clock.first_token,
            ),
            pruning=session.pruning_stats(self._model.decoder.spec),
            speculation=self._speculation(),
            kept=session.keep,
        )

    def _speculation(self) -> SpeculationFigures:
        looked_up, slim = (self.drafting.acceptance[name] for name in ("lookup", "slim"))
        return SpeculationFigures(
            lookup_drafted=looked_up.drafted,
            lookup_accepted=looked_up.accepted,
            slim_drafted=slim.drafted,
            slim_accepted=slim.accepted,
        )
