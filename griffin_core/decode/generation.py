"""What a generating session does at each step."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from griffin_core.decode.events import Finished, Started, Timings, TokensMade
from griffin_core.decode.sampling import Sampler, logprobs_at
from griffin_core.decode.session import Session
from griffin_core.decode.step import decode_tokens
from griffin_core.decode.stopping import FinishReason, StopChecker
from griffin_core.decode.task import GenerateTask
from griffin_core.model.load import Model


class Generation:
    """One turn: draw, show, stop or run the token. ``Work`` of a session."""

    def __init__(self, model: Model, task: GenerateTask) -> None:
        self._model = model
        self._decoder = model.decoder
        self._task = task
        self._sampler = Sampler(task.sampling, model.decoder.spec.vocabulary, model.decoder.device)

    def begin(self, session: Session, last_hidden: Tensor) -> None:
        """Announces the turn; the first token is drawn by the first step."""
        decoder = self._decoder
        self._logits = decoder.head(last_hidden.to(decoder.device, decoder.dtype)[None])[0]
        self._sampler.see_prompt(session.tokens)
        self._checker = StopChecker(
            self._task.stopping,
            self._model.tokenizer.stream(),
            self._model.eos_ids,
            room=decoder.spec.context_length - len(session.tokens),
        )
        session.sink.put(
            Started(
                session_id=session.session_id,
                prompt_tokens=session.prompt_tokens,
                prefill_s=session.clock.prefilled - session.clock.admitted,
                pruning=session.figures(decoder.spec.ff_width),
            )
        )

    def step(self, session: Session) -> bool:
        """Draws a token; unless it is the last, runs it to get the next one's logits."""
        assert session.cache is not None and session.view is not None
        token = self._sampler.sample(self._logits)
        top = self._task.top_logprobs
        logprobs = () if top is None else (logprobs_at(self._logits, token, top),)
        text, reason = self._checker.push(token)
        session.tokens.append(token)
        session.generated_tokens += 1
        session.turn_generated += 1
        session.clock.last_token = time.monotonic()
        session.clock.first_token = session.clock.first_token or session.clock.last_token
        session.sink.put(TokensMade(ids=(token,), text=text, logprobs=logprobs))
        if reason is not None:
            session.sink.put(self._finished(session, reason))
            return True
        ids = torch.tensor([token], device=self._decoder.device)
        hidden = decode_tokens(self._decoder, session.cache, session.view, ids)
        self._logits = self._decoder.head(hidden)[0]
        return False

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
                slim_build_s=clock.slim_build_s,
                first_token_s=clock.first_token - clock.arrived,
                decode_s=clock.last_token - clock.first_token,
            ),
            pruning=session.figures(self._decoder.spec.ff_width),
            kept=session.keep,
        )
