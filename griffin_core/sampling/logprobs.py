"""The model's own log-probabilities: before biases, penalties, temperature and truncation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from griffin_core.backends.transfers import to_host

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """The log-probabilities at one position.

    Args:
        chosen: that of the chosen token.
        top: (token id, log-probability) of the most likely tokens, in descending order.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class RowLogprobs:
    """The log-probabilities of R rows, on the device of the logits or, after ``to_host``, on the
    host.

    Args:
        chosen: [R] float32, those of the chosen tokens.
        values: [R, K] float32, those of the K most likely tokens, in descending order.
        ids: [R, K] int64, the ids of those K tokens.
    """

    chosen: Tensor
    values: Tensor
    ids: Tensor

    def to_host(self) -> RowLogprobs:
        """Returns copies on the host, which are valid once the device's stream has reached them."""
        if self.chosen.device.type == "cpu":
            return self
        return RowLogprobs(
            chosen=to_host(self.chosen), values=to_host(self.values), ids=to_host(self.ids)
        )

    def read(self, row: int, top: int) -> Logprobs:
        """Returns one row, with the ``top`` most likely of its K tokens. The values must be on the
        host."""
        ids, values = self.ids[row, :top].tolist(), self.values[row, :top].tolist()
        return Logprobs(chosen=float(self.chosen[row]), top=tuple(zip(ids, values, strict=True)))


def logprobs_of(logits: Tensor, rows: Tensor, tokens: Tensor, top: int) -> RowLogprobs:
    """Computes the log-probabilities of some rows of a step, without waiting for the device.

    Args:
        logits: [N, V] float32.
        rows: [R] int64, on the same device: the requested rows.
        tokens: [R] int64, on the same device: the chosen tokens of those rows; -1, for a row whose
            logits are not finite, counts as 0.
        top: K, the most that any of the rows requests, at most V.
    """
    values = logits.index_select(0, rows).log_softmax(dim=1)
    taken = tokens.clamp(min=0)
    best, ids = values.topk(top, dim=1)
    return RowLogprobs(chosen=values.gather(1, taken[:, None])[:, 0], values=best, ids=ids)
