"""Which transport a handoff uses: the decode server offers one, the prefill server chooses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from griffin.v1 import prefill_pb2 as pb
from griffin_server.settings import HandoffTransports
from griffin_server.transfer.base import KvExporter, KvImporter
from griffin_server.transfer.cuda_ipc import (
    INTEGER_TYPES,
    CudaIpcExporter,
    CudaIpcImporter,
    Exports,
    IpcError,
    boot_id,
    can_share,
)
from griffin_server.transfer.descriptors import DescriptorSocket
from griffin_server.transfer.messages import MessagesExporter, MessagesImporter
from griffin_server.transfer.shape import HandoffShape
from griffin_server.transfer.shared_memory import (
    DATA_START,
    Segment,
    SegmentPool,
    SharedMemoryExporter,
    SharedMemoryImporter,
    attach_segment,
)


def exporter_for(
    request: pb.PrefillRequest,
    shape: HandoffShape,
    device: torch.device,
    directory: Path | None,
) -> KvExporter:
    """The fastest transport that a request offers and that works here; messages always work. It
    may wait for the decode server for some seconds.

    Args:
        directory: of the sockets over which shared memory comes; None for no such memory.
    """
    if request.HasField("cuda_memory"):
        same_host = can_share(device) and request.cuda_memory.boot_id == boot_id()
        if same_host and shape.dtype.itemsize in INTEGER_TYPES:
            try:
                return CudaIpcExporter(shape, device, Exports(device))
            except IpcError:
                pass
    offer = request.shared_memory
    if directory is not None and offer.size_bytes >= DATA_START + shape.kv_bytes:
        segment = attach_segment(directory, offer)
        if segment is not None:
            return SharedMemoryExporter(shape, segment, device)
    return MessagesExporter(shape, device)


class TransportOffers:
    """The transports that a decode server still offers to one prefill server.

    Args:
        device: the device of the decode server's model.
        allowed: the setting ``handoff``.
        descriptors: gives shared memory to prefill servers; None does without it.
    """

    def __init__(
        self,
        device: torch.device,
        allowed: HandoffTransports,
        descriptors: DescriptorSocket | None,
    ) -> None:
        self._device = device
        self._descriptors = descriptors
        self._pool = SegmentPool()
        self._abandoned: set[asyncio.Future[Segment | None]] = set()
        self._offered: set[pb.Transport.ValueType] = set()
        if allowed != "messages" and descriptors is not None:
            self._offered.add(pb.TRANSPORT_SHARED_MEMORY)
        if allowed == "auto" and can_share(device):
            self._offered.add(pb.TRANSPORT_CUDA_MEMORY)

    async def importer(self, shape: HandoffShape) -> KvImporter:
        """The fastest transport that has not been withdrawn, for one handoff."""
        if pb.TRANSPORT_CUDA_MEMORY in self._offered:
            return CudaIpcImporter(shape, self._device)
        if pb.TRANSPORT_SHARED_MEMORY in self._offered and self._descriptors is not None:
            segment = await self._segment(DATA_START + shape.kv_bytes)
            if segment is not None:
                return SharedMemoryImporter(
                    shape, self._device, segment, self._pool, self._descriptors
                )
        return self.fallback(shape)

    def fallback(self, shape: HandoffShape) -> MessagesImporter:
        """The transport that the prefill server may choose in place of the one offered."""
        return MessagesImporter(shape, self._device)

    def withdraw(self, transport: pb.Transport.ValueType) -> None:
        """Offers a transport no longer: this prefill server cannot use it."""
        self._offered.discard(transport)

    async def close(self) -> None:
        """Frees all shared memory."""
        await asyncio.gather(*self._abandoned)
        self._pool.close()

    async def _segment(self, size_bytes: int) -> Segment | None:
        # On a thread, because allocating new memory takes about a millisecond for each MB.
        acquiring = asyncio.ensure_future(asyncio.to_thread(self._pool.acquire, size_bytes))
        try:
            return await asyncio.shield(acquiring)
        except asyncio.CancelledError:  # the thread goes on, and its segment must be released
            self._abandoned.add(acquiring)
            acquiring.add_done_callback(self._release)
            raise

    def _release(self, acquiring: asyncio.Future[Segment | None]) -> None:
        self._abandoned.discard(acquiring)
        if (segment := acquiring.result()) is not None:
            self._pool.release(segment)
