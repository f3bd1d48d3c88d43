"""Results of offline batches: completions, pieces of completions, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from griffin_core.engine.events import (
    Finished,
    PruningFigures,
    Scored,
    SpeculationFigures,
    Timings,
    TokensMade,
)
from griffin_core.engine.task import GenerateTask, ScoreTask
from griffin_core.sampling.logprobs import Logprobs
from griffin_core.sampling.stopping import FinishReason


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The completion of a prompt.

    Args:
        text: without the stop string and special tokens, unless ``StoppingParams`` asks for them.
        token_ids: all tokens that were drawn, an end token included.
        prompt_token_ids: the prompt as the model has read it.
        finish_reason: "eos", "stop_sequence", "max_tokens" or "context_length".
        stop: the stop string that matched; empty if none did.
        logprobs: those of each token; None unless ``top_logprobs`` was given.
        timings: in seconds, from when the prompt was handed to the engine.
        pruning: which experts the tokens ran on.
        speculation: how many tokens were drafted and accepted.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str
    logprobs: tuple[Logprobs, ...] | None
    timings: Timings
    pruning: PruningFigures
    speculation: SpeculationFigures = field(default_factory=SpeculationFigures)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step adds to a completion. The texts of all pieces together are the completion's
    text.

    Args:
        text: whole characters; may lag behind ``token_ids``.
        logprobs: those of each token; empty unless ``top_logprobs`` was given.
        completion: the whole completion, in its last piece, which adds nothing; None in the other
            pieces.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    completion: Completion | None = None


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """One token of a scored continuation. ``greedy`` says whether it is the most likely token
    there."""

    id: int
    logprob: float
    greedy: bool


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probability of a continuation. ``greedy`` says whether each of its tokens is the most
    likely one.

    Args:
        pruning: its experts are those of the last continuation that was scored after the same
            context. In mode "generation" these are the same for all.
    """

    logprob: float
    greedy: bool
    tokens: tuple[TokenScore, ...]
    context_tokens: int
    pruning: PruningFigures


def completion_of(task: GenerateTask, made: Sequence[TokensMade], end: Finished) -> Completion:
    """Puts a completion together from its tokens and its last event."""
    logprobs = tuple(item for each in made for item in each.logprobs)
    return Completion(
        text="".join(each.text for each in made),
        token_ids=tuple(token for each in made for token in each.ids),
        prompt_token_ids=task.prompt,
        finish_reason=end.reason,
        stop=end.stop,
        logprobs=None if task.top_logprobs is None else logprobs,
        timings=end.timings,
        pruning=end.pruning,
        speculation=end.speculation,
    )


def scores_of(task: ScoreTask, event: Scored) -> list[Score]:
    """The score of each continuation, from the task's last event."""
    return [
        Score(
            logprob=sum(scored.logprobs),
            greedy=all(scored.greedy),
            tokens=tuple(
                TokenScore(id=token, logprob=logprob, greedy=greedy)
                for token, logprob, greedy in zip(
                    continuation, scored.logprobs, scored.greedy, strict=True
                )
            ),
            context_tokens=len(task.prompt),
            pruning=event.pruning,
        )
        for continuation, scored in zip(task.continuations, event.continuations, strict=True)
    ]
