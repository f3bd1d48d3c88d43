"""What the calls of ``LLM`` take besides prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import CorrectionKind, PolicyName, ScoreMode, Sharing
from griffin_core.text.prompt import Message, Prompt

TextOrIds = str | Sequence[int]
Prompts = Prompt | Iterable[Prompt]
Chats = Sequence[Message] | Iterable[Sequence[Message]]
Items = Iterable[tuple[TextOrIds, Sequence[TextOrIds]]]


class GenerateOptions(TypedDict, total=False):
    """What ``LLM.generate`` and ``LLM.chat`` take besides prompts; see ``LLM.generate``."""

    density: float | None
    policy: PolicyName | None
    correction: CorrectionKind | None
    correction_rank: int | None
    sharing: Sharing | None
    warmup_tokens: int | None
    checks: bool | None
    agreement_floor: float | None
    speculation: SpeculationParams | None
    sampling: SamplingParams | Sequence[SamplingParams] | None
    stopping: StoppingParams | Sequence[StoppingParams] | None
    seed: int | Sequence[int] | None
    top_logprobs: int | None
    bad_words: Sequence[str]
    add_special_tokens: bool | None
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None


class ScoreOptions(TypedDict, total=False):
    """What ``LLM.score``, ``LLM.score_many`` and ``LLM.score_choices`` take besides what they
    score; see ``LLM.score``."""

    mode: ScoreMode
    density: float | None
    policy: PolicyName | None
    correction: CorrectionKind | None
    correction_rank: int | None
    sharing: Sharing | None
    seed: int | Sequence[int]
    add_special_tokens: bool | None
