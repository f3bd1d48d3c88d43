"""How many bytes sessions may hold, from what the device has left.

On a GPU that is a fraction of what is free once the weights are loaded and the memory of the steps'
graphs and of a prompt's chunk is set aside. The bytes are then claimed: the KV pool takes them from
the device at once. So the next server on the same GPU finds only what this one has left, and takes
its own fraction of that.

On a CPU it is a fraction of what is available to the process. Nothing is claimed there: the pool
takes pages as it is filled, and the default fraction leaves half to other programs.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from griffin_core.engine.cgroup import memory_left
from griffin_core.errors import DeviceMemoryExhausted
from griffin_core.experts.correction_fit import FITTED_TOKENS
from griffin_core.experts.selection import Selection
from griffin_core.forward.prefill import prefill
from griffin_core.kv.pool import KvPool, kv_bytes
from griffin_core.model.decoder import Decoder

log = logging.getLogger(__name__)

FRACTIONS = {"cuda": 0.9, "cpu": 0.5}
"""Fraction of the free memory that sessions may hold by default, for each type of device."""

GIB = 1 << 30

MEMINFO = Path("/proc/meminfo")

ASSUMED_BYTES = 8 * GIB
"""Bytes assumed to be available on a CPU where the system does not say (it is not Linux)."""

LEAST_ROWS = 16
"""A server of few sessions captures steps of so many rows too, for drafts."""

LARGEST_GRAPH, GRAPH_MODES, WORKING_LOGITS = 64, 4, 3
"""Rows of the largest captured step; the number of ways in which each step is captured; and how
many times the logits of the largest step the sampler holds."""

FITTING = 4
"""What fitting a residual takes besides, as so many times what one prompt's is fitted to: several
prompts that wait, and float32 copies."""

GRAPH_OVERHEAD = 512 << 20
"""Bytes of the graphs themselves and of a step's other intermediate results."""

ATTEMPTS = 3
"""How often to try to claim memory that another process may take first."""


def fraction_of(device: torch.device, fraction: float | None) -> float:
    """The given fraction, or the device's default if it is None."""
    return FRACTIONS[device.type] if fraction is None else fraction


def available_bytes(
    meminfo: Path = MEMINFO, left_in_groups: Callable[[], float] = memory_left
) -> int:
    """Bytes that this process can still take without swapping: the kernel's estimate for the
    machine, or what the process's control groups leave, whichever is less."""
    machine = float(ASSUMED_BYTES)
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                machine = float(int(value.removesuffix("kB")) << 10)
    except (OSError, ValueError):
        pass
    return int(min(machine, left_in_groups()))


def tokens_held(decoder: Decoder, size: int) -> int:
    """Tokens of KV that ``size`` bytes hold."""
    return size // kv_bytes(decoder.spec, decoder.dtype, 1)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a GPU has for the sessions of an engine.

    Args:
        free: bytes that are neither held nor promised.
        workspace: bytes of these that a chunk of a prompt needs while it runs.
    """

    free: int
    workspace: int

    def for_sessions(self, fraction: float) -> int:
        """Bytes that sessions may hold."""
        return max(0, int((self.free - self.workspace) * fraction))


class DeviceShare:
    """The memory of one GPU that an engine has claimed for its sessions.

    Engines of one process share torch's allocator, so the workspace that one has claimed looks free
    to the next; ``_claims`` tells them apart. Other processes are kept out by what the
    allocator holds, which is exact with one engine in the process.

    Args:
        decoder: says which device, and how much a token of KV takes.
        chunk_tokens: prompt tokens that run at once.
    """

    _claims: ClassVar[dict[torch.device, list[DeviceShare]]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, decoder: Decoder, chunk_tokens: int) -> None:
        self._decoder = decoder
        self._device = decoder.device
        self._chunk_tokens = chunk_tokens
        self.unused = 0
        """Bytes of the workspace, which no tensor holds between two passes."""

    @classmethod
    def claims(cls) -> int:
        """How many engines of this process have claimed memory and not released it."""
        with cls._lock:
            return sum(len(shares) for shares in cls._claims.values())

    def claim(
        self,
        fraction: float,
        wanted: int | None,
        graphs: int,
        allocate: Callable[[int], KvPool],
    ) -> tuple[int, KvPool]:
        """Allocates the KV pool of sessions, and claims what prompts and graphs work in until
        ``release``.

        Args:
            fraction: fraction of what is free.
            wanted: number of bytes for the sessions instead of a fraction; None for the fraction.
            graphs: bytes to leave for the steps' graphs, which are captured later.
            allocate: makes a pool of up to that many bytes.

        Returns:
            The bytes that sessions may hold, and the pool.

        Raises:
            DeviceMemoryExhausted: less is free than is wanted, or too little for any session.
        """
        with self._lock:
            workspace = self.measure_workspace() + graphs
            for _ in range(ATTEMPTS):
                room = self._room(workspace)
                size = check_room(
                    room, fraction, wanted, self._smallest_bytes(), device=str(self._device)
                )
                pool = self._allocate(size, workspace, allocate)
                if pool is not None:
                    self.unused = workspace
                    self._claims.setdefault(self._device, []).append(self)
                    return size, pool
        raise DeviceMemoryExhausted(
            f"session memory: another process takes the memory of {self._device} as fast as it is "
            f"counted; {format_bytes(room.free)} were free. Start one server after the other"
        )

    def release(self) -> None:
        """Returns to the device what no tensor uses any more."""
        with self._lock:
            self._claims[self._device].remove(self)
            gc.collect()  # caches of sessions that ended just now
            torch.cuda.empty_cache()

    def _smallest_bytes(self) -> int:
        spec = self._decoder.spec
        tokens = min(self._chunk_tokens, spec.context_length)
        return kv_bytes(spec, self._decoder.dtype, tokens)

    def _room(self, workspace: int) -> Room:
        torch.cuda.empty_cache()  # what loading has left
        free, _ = torch.cuda.mem_get_info(self._device)
        return Room(
            free=max(0, free + cached_bytes(self._device) - self._unused_by_others()),
            workspace=workspace,
        )

    def _allocate(
        self, size: int, workspace: int, allocate: Callable[[int], KvPool]
    ) -> KvPool | None:
        """A pool, with the workspace of this engine and of others still to be had; None if the
        device has less by now."""
        try:
            pool = allocate(size)
        except torch.OutOfMemoryError:
            return None
        missing = workspace + self._unused_by_others() - cached_bytes(self._device)
        return pool if missing <= 0 or grow(missing, self._device) else None

    def _unused_by_others(self) -> int:
        return sum(share.unused for share in self._claims.get(self._device, []))

    def measure_workspace(self) -> int:
        """Runs a chunk of a prompt at the end of the longest context that there is room for, since
        attention with a mask needs more memory the longer the context is. Returns the bytes that
        the chunk needs besides its KV."""
        decoder, context = self._decoder, self._decoder.spec.context_length
        while True:
            torch.cuda.empty_cache()
            try:
                return self._run_chunk(context)
            except torch.OutOfMemoryError:
                context //= 2
                if not context:
                    free, _ = torch.cuda.mem_get_info(self._device)
                    raise DeviceMemoryExhausted(
                        f"session memory: a prompt of one token does not fit what is free of "
                        f"{self._device}, {format_bytes(free)}"
                    ) from None
                log.info("a chunk after %d tokens does not fit %s", context * 2, decoder.device)

    def _run_chunk(self, context: int) -> int:
        decoder = self._decoder
        tokens = min(self._chunk_tokens, context)
        cache = decoder.new_cache(context)
        cache.advance(context - tokens)  # only sizes matter, not what the cache holds
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        events = prefill(
            decoder,
            [0] * tokens,
            Selection(density=1.0),
            cache=cache,
            chunk_tokens=self._chunk_tokens,
        )
        for _ in events:
            pass
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def step_rows(sessions: int) -> int:
    """The most rows of a step that is captured: one for each session, and enough for drafts."""
    return max(sessions, LEAST_ROWS)


def graph_bytes(decoder: Decoder, rows: int, *, tails: bool) -> int:
    """About how many bytes the graphs take: those of decode steps each keep their logits, and all
    share the memory of intermediate results.

    Args:
        rows: most rows in a captured step.
        tails: whether the graphs of prompts keep what residuals are fitted to.
    """
    if not decoder.backend.captures:
        return 0
    # It needs triton, which a server without a GPU does not import.
    from griffin_core.forward.prompt_graphs import SIZES  # noqa: PLC0415

    spec = decoder.spec
    tokens = sum(SIZES) + FITTING * FITTED_TOKENS
    values = len(spec.layers) * tokens * (spec.hidden_size + spec.intermediate_size)
    of_tails = values * decoder.dtype.itemsize if tails else 0
    all_rows = 2 << (min(rows, LARGEST_GRAPH) - 1).bit_length()  # of all sizes together
    logits = 4 * decoder.spec.vocab_size * all_rows
    return GRAPH_MODES * logits + WORKING_LOGITS * logits + GRAPH_OVERHEAD + of_tails


def check_room(
    room: Room, fraction: float, wanted: int | None, smallest: int, *, device: str
) -> int:
    """The bytes that sessions may hold.

    Args:
        wanted: see ``DeviceShare.claim``.
        smallest: bytes without which no session can begin.

    Raises:
        DeviceMemoryExhausted: there are too few; the message says what is needed and what is free.
    """
    left = max(0, room.free - room.workspace)
    if wanted is not None:
        if wanted > left:
            raise DeviceMemoryExhausted(
                f"session_memory_gib: got {wanted / GIB:g}; {device} has {format_bytes(left)} "
                "free, besides the weights, the graphs and what a prompt's chunk needs"
            )
        return wanted
    size = room.for_sessions(fraction)
    if size < smallest:
        raise DeviceMemoryExhausted(
            f"session memory: {fraction:g} of what {device} has free is {format_bytes(size)}, and "
            f"a prompt's chunk alone needs {format_bytes(smallest)} of KV. Free some memory, or "
            "start the other servers there with a smaller --memory-fraction"
        )
    return size


def grow(size: int, device: torch.device) -> bool:
    """Makes torch's allocator take bytes from a GPU and keep them. Returns whether it could."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True


def cached_bytes(device: torch.device) -> int:
    """Bytes that torch's allocator holds and no tensor uses, without those of graphs."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == index and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
    )


def budget_from_cpu(
    decoder: Decoder, fraction: float, chunk_tokens: int, available: int | None = None
) -> int:
    """Bytes that sessions may hold on a CPU.

    Args:
        available: bytes that are available; None to ask the system.

    Raises:
        DeviceMemoryExhausted: there are too few for any session.
    """
    free = available_bytes() if available is None else available
    tokens = min(chunk_tokens, decoder.spec.context_length)
    smallest = kv_bytes(decoder.spec, decoder.dtype, tokens)
    return check_room(Room(free=free, workspace=0), fraction, None, smallest, device="the machine")


def format_bytes(size: int) -> str:
    """A number of bytes for people to read, in a fitting unit."""
    units = ("bytes", "KiB", "MiB", "GiB")
    power = 0 if size < 1 else min(int(math.log2(size)) // 10, 3)
    return f"{size / (1 << 10 * power):.{1 if power else 0}f} {units[power]}"
