"""The whole service on CUDA: over gRPC, in one process and in two, by every way the KV can go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from griffin_client import Finished, GriffinClient, Tokens
from griffin_core.engine.task import ScoreTask
from griffin_core.forward.events import (
    LayerKv,
)
from griffin_core.model.load import Model, load_model
from griffin_server.transfer import cuda_ipc, messages, shared_memory
from tests.gpu.devices import needs_cuda
from tests.gpu.test_cuda import task
from tests.servers import Process, running
from tests.tiny import FAMILIES, make_tiny
from tests.unit.core.engines import complete, engine

pytestmark = [pytest.mark.gpu, needs_cuda]

TOKENS = 24
PROMPT = list(range(60))
DEVICES = {
    "one_gpu": ("cuda:0", "cuda:0"),
    "to_first": ("cuda:1", "cuda:0"),
    "to_second": ("cuda:0", "cuda:1"),
}
"""Where Prefill runs, and where Decode does."""
HANDOFFS = {
    cuda_ipc.CudaIpcImporter: "auto",
    shared_memory.SharedMemoryImporter: "shared_memory",
    messages.MessagesImporter: "messages",
}
"""What reads the KV, by the setting."""


def generate(client: GriffinClient, density: float) -> list[int]:
    stopping = {"max_tokens": TOKENS, "ignore_eos": True}
    events = list(client.generate(token_ids=PROMPT, density=density, correction="none", **stopping))
    assert isinstance(events[-1], Finished)
    return [token for event in events if isinstance(event, Tokens) for token in event.ids]


def by_engine(model: Model, density: float) -> list[int]:
    with engine(model) as alone:
        return complete(alone, task(density, prompt=len(PROMPT), tokens=TOKENS))[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_service_generates_and_scores_what_the_cpu_does(name: str, tmp_path: Path) -> None:
    where = str(make_tiny(name, tmp_path / name))
    on_cpu = load_model(where, dtype=torch.float32, device="cpu")
    expected = by_engine(on_cpu, 0.5)
    with engine(on_cpu) as alone:
        score = ScoreTask(prompt=tuple(PROMPT), continuations=(tuple(range(20)),))
        (scored,) = complete(alone, score)[1].continuations
    with running(load_model(where, dtype=torch.float32, device="cuda")) as server:
        assert generate(server.client(), 0.5) == expected
    # In bfloat16 another token wins sooner or later; what it thinks of given ones is close.
    with running(load_model(where, dtype=torch.bfloat16, device="cuda"), max_sessions=2) as server:
        assert len(generate(server.client(), 0.5)) == TOKENS
        ours = server.client().score(PROMPT, list(range(20)), density=1.0)
        exact = torch.tensor(scored.logprobs)
        got = torch.tensor([token.logprob for token in ours.tokens])
        assert (got - exact).abs().mean() < 0.15 * exact.std()


@pytest.mark.parametrize("name", FAMILIES)
def test_both_modes_score_choices_as_the_cpu_does(name: str, tmp_path: Path) -> None:
    where = str(make_tiny(name, tmp_path / name))
    choices = [[1, 2, 3], [4], list(range(20))]

    def scores(device: str, dtype: torch.dtype, density: float) -> list[torch.Tensor]:
        with running(load_model(where, dtype=dtype, device=device)) as server:
            scored = [
                score
                for mode in ("generation", "classification")
                for score in server.client().score_choices(
                    PROMPT, choices, mode=mode, density=density
                )
            ]
        return [torch.tensor([token.logprob for token in score.tokens]) for score in scored]

    expected = scores("cpu", torch.float32, 0.5)
    for ours, theirs in zip(scores("cuda", torch.float32, 0.5), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    exact = torch.cat(scores("cpu", torch.float32, 1.0))
    got = torch.cat(scores("cuda", torch.bfloat16, 1.0))
    assert (got - exact).abs().mean() < 0.15 * exact.std()


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "llama")


def count_reads(monkeypatch: pytest.MonkeyPatch, way: type) -> list[LayerKv]:
    """Events that this way brings from now on."""
    read, brought = way.read, []

    def counted(self: object, chunk: object) -> object:
        event, covered = read(self, chunk)
        brought.append(event)
        return event, covered

    monkeypatch.setattr(way, "read", counted)
    return brought


def test_a_prompt_is_analyzed_as_on_the_cpu(half: Path) -> None:
    asked = {"token_ids": PROMPT, "density": 0.5, "activation_layers": [0, 2]}
    found = []
    for device in ("cpu", "cuda"):
        with running(load_model(str(half), dtype=torch.float32, device=device)) as server:
            found.append(server.client().analyze_prompt(**asked))
    on_cpu, on_cuda = found
    for expected, got in zip(on_cpu.layers, on_cuda.layers, strict=True):
        assert got.experts.tolist() == expected.experts.tolist()
        torch.testing.assert_close(
            torch.tensor(got.s), torch.tensor(expected.s), rtol=1e-3, atol=1e-4
        )
    for layer, values in on_cpu.activations.items():
        cuda_values = torch.tensor(on_cuda.activations[layer])
        torch.testing.assert_close(cuda_values, torch.tensor(values), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("importer", HANDOFFS)
def test_two_processes_generate_what_one_does(
    importer: type, devices: str, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = DEVICES[devices]
    if int(max(there, here)[-1]) >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    model = load_model(str(half), dtype=torch.bfloat16, device=here)
    expected = by_engine(model, 0.5)
    brought = count_reads(monkeypatch, importer)
    arguments = ("--role", "prefill", "--model", str(half), "--dtype", "bfloat16")
    with Process(*arguments, "--device", there, "--prefill-chunk-tokens", "25") as prefill:
        target = prefill.target()
        with running(
            model, role="decode", prefill_target=target, handoff=HANDOFFS[importer], max_sessions=2
        ) as decode:
            for _ in range(3):
                assert generate(decode.client(), 0.5) == expected
            assert len(brought) == 3 * 3 * 3  # requests, layers, chunks
            assert all(event.kv.is_cuda for event in brought)
            prefill.kill()
            with pytest.raises(Exception, match="prefill"):
                generate(decode.client(), 0.5)
            assert decode.app.engine.sessions().result(10) == []


def test_memory_that_cannot_be_mapped_is_given_up_without_an_error(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process cannot map what it has lent itself."""
    model = load_model(str(half), dtype=torch.bfloat16, device="cuda")
    expected = by_engine(model, 0.5)
    by_segment = count_reads(monkeypatch, shared_memory.SharedMemoryImporter)
    with (
        running(model, role="prefill") as prefill,
        running(model, role="decode", prefill_target=prefill.target, max_sessions=2) as decode,
    ):
        for _ in range(2):
            assert generate(decode.client(), 0.5) == expected
        assert len(by_segment) == 2 * 3


def test_handles_that_open_nothing_are_refused() -> None:
    exports = cuda_ipc.Exports(torch.device("cuda"))
    place = exports.export(torch.ones(2, 3, 4, 5, device="cuda"))
    assert place.pitch_bytes == 4 * 5 * 4 and len(place.handle) == 64
    imports = cuda_ipc.Imports(torch.device("cuda"))
    place.handle = b"123"
    with pytest.raises(cuda_ipc.IpcError, match="3 bytes"):
        imports.copy(place, torch.zeros(4, device="cuda"), rows=1)
    place.handle = bytes(64)
    with pytest.raises(cuda_ipc.IpcError, match="cuIpcOpenMemHandle"):
        imports.copy(place, torch.zeros(4, device="cuda"), rows=1)
    imports.close()
