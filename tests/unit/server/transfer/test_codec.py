"""The handoff: core events to messages and back; each way to break it is detected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from griffin.v1 import prefill_pb2 as pb
from griffin_core.engine.task import PrefillTask
from griffin_core.errors import FingerprintMismatch, HandoffBroken, ProtocolMismatch
from griffin_core.experts.correction import (
    NO_CORRECTION,
    CorrectionParams,
    LayerCorrection,
)
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    LayerExperts,
    LayerKv,
    PrefillEvent,
    PrefillFinished,
)
from griffin_core.forward.prefill import prefill
from griffin_core.model.load import Model
from griffin_core.spec.choices import PolicyName
from griffin_server.transfer import base
from griffin_server.transfer.base import KvImporter
from griffin_server.transfer.codec import HandoffReader, HandoffWriter
from griffin_server.transfer.cuda_ipc import boot_id
from griffin_server.transfer.descriptors import DescriptorSocket
from griffin_server.transfer.messages import MessagesExporter, MessagesImporter
from griffin_server.transfer.negotiation import exporter_for
from griffin_server.transfer.protocol import NEWEST, OLDEST, negotiate
from griffin_server.transfer.shape import HandoffShape, handoff_shape
from griffin_server.transfer.shared_memory import (
    DATA_START,
    Segment,
    SegmentPool,
    SharedMemoryImporter,
    create_segment,
)

TASK = PrefillTask(token_ids=tuple(range(30)), selection=Selection(density=0.5))
CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tiny: Callable[[str], Model]) -> Model:
    return tiny(request.param)


@pytest.fixture
def shape(model: Model) -> HandoffShape:
    return handoff_shape(model, TASK)


@pytest.fixture
def events(model: Model) -> list[PrefillEvent]:
    made = prefill(model.decoder, TASK.token_ids, TASK.selection, chunk_tokens=11)
    return [event for event in made if event is not None]


Ends = tuple[HandoffWriter, HandoffReader]


def messages_writer(shape: HandoffShape) -> HandoffWriter:
    return HandoffWriter(shape, MessagesExporter(shape, CPU))


def messages_reader(shape: HandoffShape) -> HandoffReader:
    return HandoffReader(shape, MessagesImporter(shape, CPU), MessagesImporter(shape, CPU))


@pytest.fixture
def segment(shape: HandoffShape) -> Iterator[Segment]:
    made = create_segment(DATA_START + shape.kv_bytes)
    assert made is not None
    yield made
    made.close()


def segment_reader(
    shape: HandoffShape, segment: Segment, giver: DescriptorSocket
) -> tuple[KvImporter, HandoffReader]:
    importer = SharedMemoryImporter(shape, CPU, segment, SegmentPool(), giver)
    return importer, HandoffReader(shape, importer, MessagesImporter(shape, CPU))


@pytest.fixture(params=["messages", "shared memory"])
def ends(
    request: pytest.FixtureRequest,
    shape: HandoffShape,
    segment: Segment,
    giver: DescriptorSocket,
    directory: Path,
) -> Ends:
    if request.param == "messages":
        return messages_writer(shape), messages_reader(shape)
    importer, reader = segment_reader(shape, segment, giver)
    asked = pb.PrefillRequest()
    importer.offer(asked)
    return HandoffWriter(shape, exporter_for(asked, shape, CPU, directory)), reader


def messages(writer: HandoffWriter, events: list[PrefillEvent]) -> Iterator[pb.PrefillResponse]:
    yield writer.header()
    for event in events:
        match event:
            case LayerKv():
                yield from writer.kv(event)
            case LayerExperts():
                yield writer.experts(event)
            case PrefillFinished():
                yield writer.finished(event, queue_s=0.5)


def over_the_wire(message: pb.PrefillResponse) -> pb.PrefillResponse:
    return pb.PrefillResponse.FromString(message.SerializeToString())


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 700, 1])
def test_what_goes_in_comes_out(
    ends: Ends,
    events: list[PrefillEvent],
    shape: HandoffShape,
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "CHUNK_BYTES", chunk_bytes)
    writer, reader = ends
    received = [reader.read(over_the_wire(message)) for message in messages(writer, events)]
    assert received[0] is None and reader.finished

    for layer in range(shape.layers):
        sent_kv = [e for e in events if isinstance(e, LayerKv) and e.layer == layer]
        got_kv = [e for e in received if isinstance(e, LayerKv) and e.layer == layer]
        assert torch.equal(
            torch.cat([e.kv for e in got_kv], dim=2), torch.cat([e.kv for e in sent_kv], dim=2)
        )
        assert [e.first_token for e in got_kv] == [
            sum(e.kv.shape[2] for e in got_kv[:i]) for i in range(len(got_kv))
        ]
        sent = next(e for e in events if isinstance(e, LayerExperts) and e.layer == layer)
        got = next(e for e in received if isinstance(e, LayerExperts) and e.layer == layer)
        assert torch.equal(got.s2, sent.s2) and torch.equal(got.experts, sent.experts)
    last, sent_last = received[-1], events[-1]
    assert isinstance(last, PrefillFinished) and isinstance(sent_last, PrefillFinished)
    assert torch.equal(last.last_hidden, sent_last.last_hidden)


def test_kv_bytes_are_in_the_messages_or_in_the_segment_never_in_both(
    ends: Ends, events: list[PrefillEvent], shape: HandoffShape
) -> None:
    writer, _ = ends
    made = list(messages(writer, events))
    sent = sum(len(message.kv.data) for message in made)
    shared = made[0].header.transport == pb.TRANSPORT_SHARED_MEMORY
    assert sent == (0 if shared else shape.kv_bytes)


@pytest.mark.parametrize("kind", ["kv", "experts", "finished"])
def test_a_flipped_bit_anywhere_is_detected(
    ends: Ends, events: list[PrefillEvent], kind: str, segment: Segment
) -> None:
    writer, reader = ends
    with pytest.raises(HandoffBroken):
        for message in messages(writer, events):
            received = over_the_wire(message)
            if received.WhichOneof("event") == kind:
                if kind == "kv" and received.kv.data:
                    received.kv.data = flipped(received.kv.data)
                elif kind == "kv":
                    at = received.kv.segment_offset_bytes
                    byte = torch.tensor(list(segment.read(at, 1)), dtype=torch.uint8)
                    segment.write(at, byte ^ 1)
                elif kind == "experts":
                    received.experts.s = flipped(received.experts.s)
                else:
                    received.finished.last_hidden = flipped(received.finished.last_hidden)
            reader.read(received)
    assert not reader.finished


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_another_models_header_is_a_fingerprint_mismatch(
    shape: HandoffShape, events: list[PrefillEvent]
) -> None:
    header = messages_writer(shape).header()
    header.header.model_fingerprint = "f" * 64
    with pytest.raises(FingerprintMismatch, match="another model") as caught:
        messages_reader(shape).read(header)
    assert "ffff" not in str(caught.value)  # a client gets no words of a peer


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 9), ("tokens", 29), ("kv_type", pb.TENSOR_TYPE_FLOAT16)],
)
def test_a_header_that_does_not_fit_the_request_is_refused(
    shape: HandoffShape, field: str, value: int
) -> None:
    header = messages_writer(shape).header()
    setattr(header.header, field, value)
    with pytest.raises(HandoffBroken, match="header"):
        messages_reader(shape).read(header)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_header_of_another_number_of_experts_is_refused(shape: HandoffShape, more: int) -> None:
    header = messages_writer(shape).header()
    header.header.experts += more
    with pytest.raises(HandoffBroken, match="header"):
        messages_reader(shape).read(header)


@pytest.mark.parametrize("version", [0, OLDEST - 1, NEWEST + 1])
def test_a_header_in_a_version_that_was_not_asked_for_is_refused(
    shape: HandoffShape, version: int
) -> None:
    header = messages_writer(shape).header()
    header.header.protocol_version = version
    with pytest.raises(ProtocolMismatch, match=f"answers in {version}, decode understands"):
        messages_reader(shape).read(header)


@pytest.mark.parametrize(
    ("theirs", "version"), [((OLDEST, NEWEST), NEWEST), ((0, NEWEST), NEWEST), ((1, 99), NEWEST)]
)
def test_the_newest_common_version_is_spoken(theirs: tuple[int, int], version: int) -> None:
    oldest, newest = theirs
    asked = pb.PrefillRequest(oldest_protocol_version=oldest, newest_protocol_version=newest)
    assert negotiate(asked) == version


@pytest.mark.parametrize("k", [43, 45, 88])
def test_a_layer_with_another_number_of_experts_than_all_have_is_refused(
    ends: Ends, events: list[PrefillEvent], k: int
) -> None:
    writer, reader = ends
    reader.read(writer.header())
    (event, *_) = [each for each in events if isinstance(each, LayerExperts)]
    message = writer.experts(replace(event, experts=torch.arange(k, dtype=torch.int32)))
    with pytest.raises(HandoffBroken, match=rf"layer 0 has {k} experts; expected 44 to 44"):
        reader.read(message)


@pytest.mark.parametrize(
    ("ks", "words"),
    [
        ((21, 44, 44), "layer 0 has 21 experts; expected 22 to 88"),
        ((88, 22, 23), "got over 132 experts"),
        ((44, 44, 43), "got 131 of 132 experts"),
    ],
)
def test_layers_of_uneven_numbers_have_as_many_in_all_as_the_header_says(
    model: Model, ks: tuple[int, ...], words: str
) -> None:
    shape = handoff_shape(model, CORRECTED)
    writer, reader = messages_writer(shape), messages_reader(shape)
    events = [
        replace(each, experts=torch.arange(ks[each.layer], dtype=torch.int32))
        if isinstance(each, LayerExperts)
        else each
        for each in corrected_events(model)
    ]
    with pytest.raises(HandoffBroken, match=words):
        for message in messages(writer, events):
            reader.read(message)


def test_layers_with_corrections_of_different_kinds_are_refused(model: Model) -> None:
    shape = handoff_shape(model, CORRECTED)
    writer, reader = messages_writer(shape), messages_reader(shape)
    reader.read(writer.header())
    one, other, _ = (e for e in corrected_events(model) if isinstance(e, LayerExperts))
    reader.read(writer.experts(one))
    assert other.correction is not None
    bias = LayerCorrection(bias=other.correction.bias)
    with pytest.raises(HandoffBroken, match="the correction of layer 1 is of another kind"):
        reader.read(writer.experts(replace(other, correction=bias)))


@pytest.mark.parametrize(
    ("tokens", "density", "policy", "allowed"),
    [
        (140, 1.0, "topk", "none"),
        (47, 0.5, "topk", "none"),
        (47, 0.5, "sensitive", "bias"),
        (127, 0.5, "topk", "bias"),
        (128, 0.5, "topk", "residual"),
    ],
)
def test_a_handoff_allows_the_correction_that_its_prompt_can_be_given(
    model: Model, tokens: int, density: float, policy: PolicyName, allowed: str
) -> None:
    selection = Selection(
        density=density, policy=policy, correction=CorrectionParams(kind="residual", rank=5)
    )
    shape = handoff_shape(model, PrefillTask(token_ids=(1,) * tokens, selection=selection))
    assert shape.correction.kind == allowed


def test_a_segment_that_the_other_end_did_not_prove_is_not_read(
    shape: HandoffShape, segment: Segment, giver: DescriptorSocket
) -> None:
    importer, reader = segment_reader(shape, segment, giver)
    asked = pb.PrefillRequest()
    importer.offer(asked)
    header = messages_writer(shape).header()
    header.header.transport = pb.TRANSPORT_SHARED_MEMORY
    for proof in (b"", b"x" * 16, asked.shared_memory.nonce):
        header.header.proof = proof
        with pytest.raises(HandoffBroken, match="not proved"):
            reader.read(header)


@pytest.mark.parametrize(
    "transport",
    [pb.TRANSPORT_SHARED_MEMORY, pb.TRANSPORT_CUDA_MEMORY, pb.TRANSPORT_UNSPECIFIED],
)
def test_a_transport_that_was_not_offered_is_refused(
    shape: HandoffShape, transport: pb.Transport.ValueType
) -> None:
    header = messages_writer(shape).header()
    header.header.transport = transport
    with pytest.raises(HandoffBroken, match="not offered"):
        messages_reader(shape).read(header)


def test_a_declined_offer_falls_back_to_messages(
    shape: HandoffShape, events: list[PrefillEvent], segment: Segment, giver: DescriptorSocket
) -> None:
    _, reader = segment_reader(shape, segment, giver)
    for message in messages(messages_writer(shape), events):
        reader.read(over_the_wire(message))
    assert reader.finished and reader.declined


def test_a_cpu_exports_no_gpu_memory(shape: HandoffShape) -> None:
    asked = pb.PrefillRequest()
    asked.cuda_memory.boot_id = boot_id()
    assert isinstance(exporter_for(asked, shape, CPU, None), MessagesExporter)


def test_messages_out_of_order_are_refused(shape: HandoffShape, events: list[PrefillEvent]) -> None:
    header, *rest = messages(messages_writer(shape), events)
    with pytest.raises(HandoffBroken, match="out of order"):
        messages_reader(shape).read(rest[0])
    reader = messages_reader(shape)
    reader.read(header)
    with pytest.raises(HandoffBroken, match="out of order"):
        reader.read(header)
    for message in rest:
        reader.read(message)
    with pytest.raises(HandoffBroken, match="out of order"):
        reader.read(rest[0])


def test_a_message_of_no_kind_is_refused(shape: HandoffShape) -> None:
    reader = messages_reader(shape)
    reader.read(messages_writer(shape).header())
    with pytest.raises(HandoffBroken, match="unknown kind"):
        reader.read(pb.PrefillResponse())


@pytest.mark.parametrize("tokens", [0, 5, 31, 1 << 31])
def test_a_chunk_whose_size_is_not_its_tokens_is_refused(shape: HandoffShape, tokens: int) -> None:
    reader = messages_reader(shape)
    reader.read(messages_writer(shape).header())
    with pytest.raises(HandoffBroken, match="a chunk of"):
        reader.read(pb.PrefillResponse(kv=pb.KvChunk(tokens=tokens, data=b"123")))


def test_experts_outside_the_layer_are_refused(shape: HandoffShape) -> None:
    reader = messages_reader(shape)
    reader.read(messages_writer(shape).header())
    experts = (999).to_bytes(4, "little")
    with pytest.raises(HandoffBroken, match=r"in .0, 88."):
        reader.read(pb.PrefillResponse(experts=pb.LayerExperts(s=b"", experts=experts)))


def test_a_statistic_that_is_no_floats_is_refused(shape: HandoffShape) -> None:
    reader = messages_reader(shape)
    reader.read(messages_writer(shape).header())
    with pytest.raises(HandoffBroken, match="handoff"):
        reader.read(pb.PrefillResponse(experts=pb.LayerExperts(s=b"123", experts=b"")))


CORRECTED = PrefillTask(
    token_ids=tuple((7 * n + n * n) % 250 for n in range(140)),
    selection=Selection(
        density=0.5, policy="sensitive", correction=CorrectionParams(kind="residual", rank=5)
    ),
)
"""Layers have different numbers of experts, and a residual."""


def corrected_events(model: Model) -> list[PrefillEvent]:
    events = prefill(model.decoder, CORRECTED.token_ids, CORRECTED.selection)
    return [event for event in events if event is not None]


def as_type(event: PrefillEvent, dtype: torch.dtype) -> PrefillEvent:
    """What a model of another dtype would hand over."""
    if isinstance(event, LayerKv):
        return replace(event, kv=event.kv.to(dtype))
    if not isinstance(event, LayerExperts):
        return event
    own = event.correction
    assert own is not None and own.into is not None and own.out is not None
    bias, into, out = (each.to(dtype) for each in (own.bias, own.into, own.out))
    return replace(event, correction=LayerCorrection(bias=bias, into=into, out=out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_and_corrections_of_layers_arrive_as_they_are(
    model: Model, dtype: torch.dtype
) -> None:
    shape = replace(handoff_shape(model, CORRECTED), dtype=dtype)
    events = [as_type(event, dtype) for event in corrected_events(model)]
    writer, reader = messages_writer(shape), messages_reader(shape)
    received = [reader.read(over_the_wire(message)) for message in messages(writer, events)]
    assert reader.finished
    arrived = [each for each in received if isinstance(each, LayerExperts)]
    sent = [each for each in events if isinstance(each, LayerExperts)]
    assert len({len(each.experts) for each in arrived}) > 1
    for one, other in zip(arrived, sent, strict=True):
        assert torch.equal(one.experts, other.experts)
        torch.testing.assert_close(one.sums, other.sums, rtol=1e-6, atol=0)
        assert one.correction is not None and other.correction is not None
        assert one.correction.rank == 5 and one.correction.equals(other.correction)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.ClearField("bias"), r"correction of layer 0: got 0 bytes of bias"),
        (lambda m: m.ClearField("out"), r"0 bytes of out"),
        (lambda m: setattr(m, "into", m.into[:-4]), r"bytes of into"),
        (lambda m: setattr(m, "bias", m.bias * 2), r"384 bytes of bias"),
        (
            lambda m: (setattr(m, "into", m.into * 2), setattr(m, "out", m.out * 2)),
            r"residual of rank up to 5",
        ),
        (lambda m: setattr(m, "bias", b"\xff" * len(m.bias)), r"finite bias"),
        (lambda m: setattr(m, "out", b"\xff" * len(m.out)), r"finite out"),
        (lambda m: setattr(m, "squares", m.squares[:-4]), r"squares of layer 0: got 87"),
        (lambda m: setattr(m, "values", b""), r"values of layer 0: got 0"),
        (lambda m: setattr(m, "squares", b"\xff" * len(m.squares)), r"finite squares"),
    ],
)
def test_a_spoiled_correction_or_sum_is_refused_by_name(
    model: Model, change: Callable[[pb.LayerExperts], object], words: str
) -> None:
    shape = handoff_shape(model, CORRECTED)
    writer, reader = messages_writer(shape), messages_reader(shape)
    reader.read(writer.header())
    event = next(each for each in corrected_events(model) if isinstance(each, LayerExperts))
    message = writer.experts(event)
    change(message.experts)
    with pytest.raises(HandoffBroken, match=words):
        reader.read(message)


def test_a_correction_that_nobody_asked_for_is_refused(model: Model) -> None:
    event = next(each for each in corrected_events(model) if isinstance(each, LayerExperts))
    shape = replace(handoff_shape(model, CORRECTED), correction=NO_CORRECTION)
    writer, reader = messages_writer(shape), messages_reader(shape)
    reader.read(writer.header())
    with pytest.raises(HandoffBroken, match="allowed: none"):
        reader.read(writer.experts(event))
