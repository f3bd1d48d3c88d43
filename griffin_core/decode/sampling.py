"""From logits to a token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from griffin_core.errors import InvalidRequest

MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; the defaults change nothing. Ranges as in generation.proto.

    Raises:
        InvalidRequest: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, allowed: str) -> None:
            value = getattr(self, name)
            if not (holds and math.isfinite(value)):
                raise InvalidRequest(f"sampling.{name}", value, allowed)

        check("temperature", self.temperature >= 0, ">= 0")
        check("top_k", self.top_k >= 0, ">= 0")
        check("top_p", 0 < self.top_p <= 1, "(0, 1]")
        check("min_p", 0 <= self.min_p <= 1, "[0, 1]")
        check("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "[0.01, 100]")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "[-2, 2]")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "[-2, 2]")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequest(
                "sampling.logit_bias",
                f"{len(self.logit_bias)} entries",
                f"at most {MAX_LOGIT_BIASES}",
            )
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:  # NaN fails too
                raise InvalidRequest(f"sampling.logit_bias[{token}]", bias, "[-100, 100]")

    @property
    def penalizes(self) -> bool:
        """Whether tokens already seen matter."""
        additive = self.presence_penalty != 0 or self.frequency_penalty != 0
        return additive or self.repetition_penalty != 1


class Sampler:
    """Draws one session's tokens; holds its random state and what it has seen.

    Args:
        vocabulary: V.
    """

    def __init__(self, params: SamplingParams, vocabulary: int, device: torch.device) -> None:
        self._params = params
        # On the CPU for every device, so that a seed gives the same tokens on all of them.
        self._generator = torch.Generator().manual_seed(params.seed)
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias), device=device)
            self._bias = tokens, torch.tensor(list(params.logit_bias.values()), device=device)
        self._in_prompt: Tensor | None = None
        self._in_output: Tensor | None = None
        if params.penalizes:
            self._in_prompt = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._in_output = torch.zeros(vocabulary, device=device)

    def see_prompt(self, token_ids: Sequence[int]) -> None:
        """Tells of tokens that were not drawn; the repetition penalty counts them."""
        if self._in_prompt is not None:
            self._in_prompt[torch.tensor(token_ids, device=self._in_prompt.device)] = True

    def sample(self, logits: Tensor, likeliest: int | None = None) -> int:
        """Draws a token from logits [V] float32, which are left as they are.

        Args:
            likeliest: index of their maximum if it is known: a step finds it for all its sessions
                at once.
        """
        shaped = self._shaped(logits)
        plain = shaped is logits and self._params.temperature == 0
        token = likeliest if plain and likeliest is not None else self._draw(shaped)
        if self._in_output is not None:
            self._in_output[token] += 1
        return token

    def _shaped(self, logits: Tensor) -> Tensor:
        p = self._params
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        if self._in_prompt is not None and self._in_output is not None:
            seen = self._in_prompt | (self._in_output > 0)
            repeated = torch.where(
                logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty
            )
            logits = torch.where(seen, repeated, logits)
            logits = logits - p.presence_penalty * (self._in_output > 0)
            logits = logits - p.frequency_penalty * self._in_output
        return logits

    def _draw(self, logits: Tensor) -> int:
        p = self._params
        if p.temperature == 0:
            return int(logits.argmax())
        # In float64, where no temperature and no top_p that a request can hold is 0; and shifted
        # first: logits / 1e-320 is infinite, 0 / 1e-320 is not.
        logits = logits.cpu().double()
        logits = (logits - logits.max()) / p.temperature
        probabilities = truncate(logits.softmax(dim=0), top_k=p.top_k, top_p=p.top_p, min_p=p.min_p)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def truncate(probabilities: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Keeps the k likeliest, then the smallest set that reaches top_p, then those at least min_p
    times as likely as the likeliest: [V] -> [V], renormalized. At least one token stays."""
    if top_k == 0 and top_p == 1 and min_p == 0:
        return probabilities
    ranked, order = probabilities.sort(descending=True, stable=True)
    if top_k:
        ranked[top_k:] = 0
        ranked = ranked / ranked.sum()
    if top_p < 1:
        before = ranked.cumsum(dim=0) - ranked  # the likelier tokens' share
        ranked[before >= top_p] = 0
        ranked = ranked / ranked.sum()
    if min_p:
        ranked[ranked < min_p * ranked[0]] = 0
        ranked = ranked / ranked.sum()
    return torch.zeros_like(probabilities).scatter_(0, order, ranked)


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """The model's own log-probabilities at one place: before penalties, temperature, truncation.

    Args:
        chosen: of the token that was taken.
        top: (token id, log-probability) of the likeliest, in falling order.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def logprobs_at(logits: Tensor, token: int, top: int) -> Logprobs:
    """Log-probabilities from logits [V] of ``token`` and of the ``top`` likeliest."""
    values = logits.log_softmax(dim=0)
    best, ids = values.topk(top)
    return Logprobs(
        chosen=float(values[token]), top=tuple(zip(ids.tolist(), best.tolist(), strict=True))
    )
