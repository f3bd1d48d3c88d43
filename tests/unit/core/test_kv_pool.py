"""The KV pool moves sequences as their slots need it, and no sequence notices."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from griffin_core.kv import pool as pools
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool

LAYERS, HEADS, DIM, TOKENS = 3, 2, 4, 60


def new_pool() -> KvPool:
    return KvPool([torch.zeros(2, HEADS, TOKENS + 1, DIM) for _ in range(LAYERS)])


def fill(cache: KvCache) -> list[Tensor]:
    """Fills a cache with random numbers. Returns them, layer by layer."""
    kv = [torch.randn(2, HEADS, cache.capacity, DIM) for _ in range(LAYERS)]
    for layer, tensor in enumerate(kv):
        cache.slice(layer, 0, cache.capacity).copy_(tensor)
    cache.length = cache.capacity
    return kv


def check(cache: KvCache, kv: list[Tensor]) -> None:
    for layer, tensor in enumerate(kv):
        assert torch.equal(cache.slice(layer, 0, cache.length), tensor[:, :, : cache.length])


@pytest.mark.parametrize("move_tokens", [1, 3, 4096])
@pytest.mark.parametrize("seed", range(20))
def test_sequences_keep_their_tokens_whatever_comes_goes_and_grows(
    monkeypatch: pytest.MonkeyPatch, seed: int, move_tokens: int
) -> None:
    monkeypatch.setattr(pools, "MOVE_TOKENS", move_tokens)
    draw, pool = random.Random(seed), new_pool()
    held: list[tuple[KvCache, list[Tensor]]] = []
    for _ in range(60):
        match draw.choice(["allocate", "allocate", "free", "resize"]):
            case "allocate" if pool.free_tokens:
                cache = pool.allocate(draw.randint(1, pool.free_tokens))
                held.append((cache, fill(cache)))
            case "free" if held:
                pool.free(held.pop(draw.randrange(len(held)))[0])
            case "resize" if held:
                cache, kv = draw.choice(held)
                capacity = draw.randint(1, cache.capacity + pool.free_tokens)
                cache.rewind(min(cache.length, capacity))
                cache.resize(capacity)
            case _:
                pass
        for cache, kv in held:
            check(cache, kv)
        assert pool.free_tokens == TOKENS - sum(cache.capacity for cache, _ in held)


@pytest.mark.parametrize("grows", [False, True])
def test_without_temporary_memory_nothing_is_moved_and_no_slot_is_lost(
    monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    pool = new_pool()
    caches = [pool.allocate(10) for _ in range(6)]
    kept = [(cache, fill(cache)) for cache in caches[1::2]]
    for cache in caches[::2]:
        pool.free(cache)

    def fail(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError

    def move() -> None:
        if grows:
            kept[0][0].resize(30)
        else:
            pool.allocate(25)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", fail)
        with pytest.raises(torch.OutOfMemoryError):
            move()
    assert pool.free_tokens == 30
    for cache, kv in kept:
        check(cache, kv)
    move()
    for cache, kv in kept:
        check(cache, kv)


def test_neighbours_move_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = new_pool()
    caches = [pool.allocate(3) for _ in range(20)]
    pool.free(caches[0])
    pool.free(caches[10])
    copies = 0
    real = Tensor.copy_

    def counted(self: Tensor, *arguments: Tensor) -> Tensor:
        nonlocal copies
        copies += 1
        return real(self, *arguments)

    monkeypatch.setattr(Tensor, "copy_", counted)
    pool.allocate(6)
    assert copies == LAYERS * 2 * 2  # two runs of neighbours, out and in
