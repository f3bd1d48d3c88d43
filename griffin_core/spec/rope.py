"""Rotary positions (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RotarySpec:
    """The rotary positions of one kind of layer.

    Args:
        inverse_frequencies: head_dim / 2 values, in radians per position.
        scale: the factor on cos and sin (YaRN's attention factor; 1 otherwise).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
