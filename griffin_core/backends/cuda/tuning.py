"""Configurations that the kernels choose among: measured once for each shape, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tuned(configs: Sequence[Any], key: Sequence[str]) -> Any:
    """``triton.autotune``, whose choice outlives the process (in Triton's cache directory). The
    first configuration is good everywhere; Triton's interpreter takes it unmeasured.

    Args:
        key: arguments whose values make a shape.
    """
    if INTERPRETED:
        return triton.autotune(configs=list(configs[:1]), key=list(key))
    return triton.autotune(configs=list(configs), key=list(key), cache_results=True)


@cache
def pdl_options() -> dict[str, Any]:
    """Options of a launch: on Hopper and later, that a kernel may begin before the one ahead of it
    has ended (programmatic dependent launch). It then reads weights, and waits before it touches
    what others write; ``OVERLAPS`` tells it so."""
    begins = not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)
    return {"OVERLAPS": True, "launch_pdl": True} if begins else {"OVERLAPS": False}


@triton.jit
def pdl_wait(OVERLAPS: tl.constexpr):
    """Lets the next kernel begin, and waits for the end of the one ahead."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


def config(warps: int, stages: int, **blocks: int) -> Any:
    """A Triton autotuning configuration."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)
