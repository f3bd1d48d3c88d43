"""Autotuning of Triton kernels: configurations are measured once per shape and kept on disk."""

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
    """Applies ``triton.autotune`` with results kept in Triton's cache directory. The first
    configuration works well everywhere; Triton's interpreter uses it without measuring.

    Args:
        key: names of the kernel arguments that identify a shape.
    """
    if INTERPRETED:
        return triton.autotune(configs=list(configs[:1]), key=list(key))
    return triton.autotune(configs=list(configs), key=list(key), cache_results=True)


@cache
def pdl_options() -> dict[str, Any]:
    """Returns the options of a launch. On Hopper and later a kernel may start before the previous
    one has ended (programmatic dependent launch): it prefetches weights, then waits before it
    touches memory that others write. ``OVERLAPS`` tells the kernel whether it must wait."""
    begins = not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)
    return {"OVERLAPS": True, "launch_pdl": True} if begins else {"OVERLAPS": False}


@triton.jit
def pdl_wait(OVERLAPS: tl.constexpr):
    """Lets the next kernel start, and waits for the end of the previous one."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


def config(warps: int, stages: int, **blocks: int) -> Any:
    """A Triton autotuning configuration."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)
