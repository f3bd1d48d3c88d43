"""Gives a session's experts the correction that its request asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.correction_fit import (
    FITTED_TOKENS,
    Tail,
    kind_for,
    with_bias,
    with_residual,
)
from griffin_core.experts.selection import Selection
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.model.decoder import Decoder


def corrected(
    decoder: Decoder,
    slim: SlimSpec,
    statistics: Statistics,
    selection: Selection,
    tails: Sequence[Sequence[Tail]] = (),
) -> SlimSpec:
    """Returns the same experts with a correction fitted to them. A residual that is not finite
    becomes a bias, and a bias that is not finite nothing; so does what the prompt is too short for.

    Args:
        statistics: of all tokens of the session, or of all sessions of a group.
        tails: for each pass over the last tokens of the prompt, a tail for each layer; without them
            a residual becomes a bias.
    """
    params = selection.correction_for(statistics.tokens)
    if params.kind == "none" or not slim.prunes:
        return slim
    down = [layer.ff.weights.down for layer in decoder.layers]
    if params.kind == "residual" and tails:
        whole = [_joined(parts) for parts in zip(*tails, strict=True)]
        fitted = with_residual(slim, whole, down, params.rank)
        if fitted.correction is not None and fitted.correction.is_finite:
            return fitted
    biased = with_bias(slim, statistics, down, decoder.calibration)
    return biased if biased.correction is not None and biased.correction.is_finite else slim


def correction_bytes(decoder: Decoder, selection: Selection, tokens: int) -> int:
    """Returns the most bytes that a session's correction takes, and what it is fitted to.

    Args:
        tokens: of the prompt of this turn.
    """
    spec, itemsize = decoder.spec, decoder.dtype.itemsize
    layers, params = len(spec.layers), selection.correction
    if kind_for(params, tokens, prior=True) != "residual":
        bias = CorrectionParams(kind="none" if params.kind == "none" else "bias")
        return bias.nbytes(layers, spec.hidden_size, itemsize)
    rows = min(tokens, FITTED_TOKENS) * (spec.hidden_size + spec.intermediate_size)
    return params.nbytes(layers, spec.hidden_size, itemsize) + layers * rows * itemsize


def _joined(parts: Sequence[Tail]) -> Tail:
    if len(parts) == 1:
        return parts[0]
    return Tail(x=torch.cat([part.x for part in parts]), z=torch.cat([part.z for part in parts]))
