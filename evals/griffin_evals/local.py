"""Answers requests with a model in this process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from griffin_core.errors import GriffinError, InvalidRequest
from griffin_core.llm import LLM
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import FinishReason, StoppingParams
from griffin_evals.backend import (
    Generated,
    GenerateItem,
    ModelFacts,
    Scored,
    ScoreItem,
    calibrated_fingerprint,
    scored_of,
)
from griffin_evals.errors import RequestRefused
from griffin_evals.settings import Settings


class LocalBackend:
    """A ``griffin_core.LLM``; a ``Backend``. Items are token ids.

    Args:
        model: a model that ``LLM`` accepts.
        options: further arguments of ``LLM``.
    """

    def __init__(self, model: str | Model, **options: Any) -> None:
        self._llm = LLM(model, **options)
        self.model = self._llm.model
        self.facts = ModelFacts(
            name=self.model.name,
            fingerprint=calibrated_fingerprint(
                self.model.fingerprint, self.model.decoder.calibration_digest
            ),
            dtype=str(self.model.decoder.dtype).removeprefix("torch."),
            context_length=self.model.decoder.spec.context_length,
        )

    def score(
        self,
        items: Sequence[ScoreItem],
        settings: Settings,
        answered: Callable[[int, list[Scored]], None],
    ) -> None:
        with _naming(items):
            for index, scores in self._llm.score_choices(
                [(item.context, item.continuations) for item in items],
                mode=settings.asked_mode,
                density=settings.density,
                policy=settings.policy,
                correction=settings.correction,
                correction_rank=settings.correction_rank,
                sharing=settings.sharing,
                seed=[item.seed for item in items],
                stream=True,
            ):
                answered(index, [scored_of(score) for score in scores])

    def generate(
        self,
        items: Sequence[GenerateItem],
        settings: Settings,
        answered: Callable[[int, Generated], None],
    ) -> None:
        sampling, stopping = [], []
        for item in items:
            try:
                sampling.append(SamplingParams(**item.sampling))  # type: ignore[arg-type]  # by name
                stopping.append(StoppingParams(max_tokens=item.max_tokens, stop=item.stop))
            except InvalidRequest as error:
                raise RequestRefused(f"{item.name}: {error}") from error
        with _naming(items):
            pieces = self._llm.generate(
                [item.prompt for item in items],
                density=settings.density,
                policy=settings.policy,
                correction=settings.correction,
                correction_rank=settings.correction_rank,
                warmup_tokens=settings.warmup_tokens,
                sharing=settings.sharing,
                sampling=sampling,
                stopping=stopping,
                seed=[item.seed for item in items],
                stream=True,
            )
            for index, piece in pieces:
                if (done := piece.completion) is not None:
                    answered(
                        index,
                        Generated(
                            text=done.text,
                            tokens=done.generated_tokens,
                            norm_mass=done.pruning.mean_norm_mass,
                            cut=done.finish_reason == FinishReason.CONTEXT_LENGTH,
                        ),
                    )

    def close(self) -> None:
        self._llm.close()


@contextmanager
def _naming(items: Sequence[ScoreItem] | Sequence[GenerateItem]) -> Iterator[None]:
    """Makes errors name the item, where the core gives its index."""
    try:
        yield
    except GriffinError as error:
        words = "\n".join([str(error), *getattr(error, "__notes__", [])])
        if (found := re.search(r"(items|prompts)\[(\d+)\]", words)) is None:
            raise
        raise RequestRefused(f"{items[int(found[2])].name}: {error}") from error
