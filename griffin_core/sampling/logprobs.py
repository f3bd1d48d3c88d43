"""The model's own log-probabilities: before biases, penalties, temperature and truncation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from griffin_core.backends.transfers import to_host

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Log-probabilities at one place.

    Args:
        chosen: of the token that was taken.
        top: (token id, log-probability) of the likeliest, in falling order.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class RowLogprobs:
    """Log-probabilities of R rows, where their logits are; or, after ``to_host``, on the host.

    Args:
        chosen: [R] float32, of the tokens that were taken.
        values: [R, K] float32, of the K likeliest, in falling order.
        ids: [R, K] int64, which those are.
    """

    chosen: Tensor
    values: Tensor
    ids: Tensor

    def to_host(self) -> RowLogprobs:
        """Copies, which have arrived once the device's stream has come by."""
        if self.chosen.device.type == "cpu":
            return self
        return RowLogprobs(
            chosen=to_host(self.chosen), values=to_host(self.values), ids=to_host(self.ids)
        )

    def read(self, row: int, top: int) -> Logprobs:
        """Those of one row, with the ``top`` likeliest of its K. They must be on the host."""
        ids, values = self.ids[row, :top].tolist(), self.values[row, :top].tolist()
        return Logprobs(chosen=float(self.chosen[row]), top=tuple(zip(ids, values, strict=True)))


def logprobs_of(logits: Tensor, rows: Tensor, tokens: Tensor, top: int) -> RowLogprobs:
    """Log-probabilities of some rows of a step; nothing waits for the device.

    Args:
        logits: [N, V] float32.
        rows: [R] int64, on the same device: the rows that are asked for.
        tokens: [R] int64, on the same device: what those rows took; -1, of a row whose logits are
            not finite, counts as 0.
        top: K, the most that any of them asks for, at most V.
    """
    values = logits.index_select(0, rows).log_softmax(dim=1)
    taken = tokens.clamp(min=0)
    best, ids = values.topk(top, dim=1)
    return RowLogprobs(chosen=values.gather(1, taken[:, None])[:, 0], values=best, ids=ids)
