"""AnalyzePrompt and `griffin inspect`: what a prompt fires, as a prefill of it sees it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_client import (
    AsyncGriffinClient,
    DeadlineExceeded,
    GriffinClient,
    InvalidArgument,
    ResourceExhausted,
)
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    LayerActivations,
    LayerExperts,
)
from griffin_core.forward.prefill import prefill
from griffin_core.model.load import Model
from griffin_server.commands import app
from griffin_server.commands.plots import jaccard, norm_mass_curve
from griffin_server.rpc.messages import prompt_analysis
from tests.servers import SMALL_WINDOW, Running, eventually, running
from tests.tiny import CONTEXT, FAMILIES

PROMPT = "The quick brown fox jumps over the lazy dog."
HALF = Selection(density=0.5)


@pytest.fixture
def client(tiny_server: Running) -> Iterator[GriffinClient]:
    with tiny_server.client() as connected:
        yield connected


@pytest.mark.parametrize("name", FAMILIES)
def test_what_comes_is_what_a_prefill_finds(name: str, tiny: Callable[[str], Model]) -> None:
    model = tiny(name)
    with running(model, prefill_chunk_tokens=7) as server, server.client() as client:
        found = client.analyze_prompt(PROMPT, density=0.5, activation_layers=[0, 2])
    events = list(prefill(model.decoder, found.token_ids, HALF))
    for layer, expected in enumerate(e for e in events if isinstance(e, LayerExperts)):
        got = found.layers[layer]
        assert got.experts.tolist() == expected.experts.tolist()
        np.testing.assert_allclose(
            np.array(got.s), expected.s2.sqrt().numpy(), rtol=1e-4, atol=1e-5
        )
        s2 = expected.s2
        mass = s2[expected.experts.long()].sum() / s2.sum()
        assert got.norm_mass == pytest.approx(mass.item(), rel=1e-4)
    assert found.activations.keys() == {0, 2}
    for layer, flat in found.activations.items():
        values = np.array(flat).reshape(len(found.token_ids), found.ff_width)
        s = np.sqrt(np.square(values).sum(axis=0))
        np.testing.assert_allclose(s, np.array(found.layers[layer].s), rtol=1e-4, atol=1e-5)


def test_the_tokens_are_those_generate_would_read(client: GriffinClient) -> None:
    found = client.analyze_prompt(PROMPT, request_id="of-mine")
    done = client.complete(PROMPT, max_tokens=1)
    assert len(found.token_ids) == done.started.prompt_tokens
    assert "".join(found.texts).strip() == PROMPT
    assert found.request_id == "of-mine"
    assert client.analyze_prompt(token_ids=found.token_ids).layers == found.layers


def test_a_server_that_prefills_elsewhere_analyzes_itself(tiny: Callable[[str], Model]) -> None:
    with (
        running(tiny("llama"), role="prefill") as other,
        running(tiny("llama"), role="decode", prefill_target=[other.target]) as server,
        server.client() as client,
        running(tiny("llama")) as whole,
        whole.client() as alone,
    ):
        assert client.analyze_prompt(PROMPT).layers == alone.analyze_prompt(PROMPT).layers


async def test_the_asynchronous_client_gives_the_same(
    tiny_server: Running, client: GriffinClient
) -> None:
    async with AsyncGriffinClient(tiny_server.target) as other:
        found = await other.analyze_prompt(PROMPT, activation_layers=[1], request_id="a")
    assert found == client.analyze_prompt(PROMPT, activation_layers=[1], request_id="a")


def test_activations_come_in_messages_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_analysis, "MAX_VALUES_BYTES", 100)
    values = torch.rand(7, 10)
    event = LayerActivations(layer=3, first_token=20, values=values)
    messages = [message.activations for message in prompt_analysis.event_to_pb(event)]
    assert [message.first_token for message in messages] == [20, 22, 24, 26]
    assert all(len(message.values) <= 100 for message in messages)
    sent = b"".join(message.values for message in messages)
    np.testing.assert_array_equal(np.frombuffer(sent, "<f4").reshape(7, 10), values.numpy())


@pytest.mark.parametrize(
    ("options", "field", "given", "allowed"),
    [
        ({"prompt": None}, "input", "none", "exactly one of text, token_ids, messages"),
        ({"prompt": ""}, "text", "an empty prompt", "at least one token"),
        ({"prompt": "x" * (CONTEXT + 1)}, "text", f"{CONTEXT + 1} tokens", f"at most {CONTEXT}"),
        ({"density": 2.0}, "pruning.density", "2.0", "(0, 1]"),
        ({"activation_layers": [0, 3]}, "activation_layers[1]", "3", "[0, 3)"),
        ({"activation_layers": [0] * 9}, "activation_layers", "9 layers", "up to 8"),
    ],
)
def test_bad_input_is_refused_by_name(
    options: dict, field: str, given: str, allowed: str, client: GriffinClient
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.analyze_prompt(**{"prompt": PROMPT, **options})
    assert all(word in str(caught.value) for word in (field, given, allowed))


def test_sharing_has_no_meaning_here(tiny_server: Running) -> None:
    request = pb.AnalyzePromptRequest(
        text=PROMPT, pruning=pb.Pruning(sharing=pb.EXPERT_SHARING_SHARED)
    )
    with grpc.insecure_channel(tiny_server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(Exception, match=r"pruning\.sharing"):
            list(stub.AnalyzePrompt(request))


def test_a_call_that_ends_early_leaves_nothing_behind(tiny: Callable[[str], Model]) -> None:
    with (
        running(tiny("llama"), prefill_chunk_tokens=1) as server,
        server.client() as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for _ in range(10):
            call = stub.AnalyzePrompt(pb.AnalyzePromptRequest(text="x" * 200))
            assert next(call).HasField("started")
            call.cancel()
        with pytest.raises(DeadlineExceeded):
            client.analyze_prompt("x" * 200, timeout=0.001)
        eventually(lambda: not server.app.engine.snapshot().result(10).prefills.queued)
        assert client.analyze_prompt(PROMPT).layers
        assert client.list_sessions() == []


def test_a_reader_that_stops_is_given_up_and_the_next_has_its_turn(
    tiny: Callable[[str], Model],
) -> None:
    request = pb.AnalyzePromptRequest(text="x" * 3000, activation_layers=[0, 1, 2])
    # In small chunks: a pass runs to its end, and what is then left is what the reader holds up.
    settings = {"reader_timeout_s": 0.3, "prefill_chunk_tokens": 128}
    with running(tiny("llama-long"), **settings) as server:
        with (
            grpc.insecure_channel(server.target, options=SMALL_WINDOW) as channel,
            server.client() as client,
        ):
            call = generation_pb2_grpc.GenerationServiceStub(channel).AnalyzePrompt(request)
            assert next(call).HasField("started")
            # One at a time, since no reservation covers their caches.
            assert client.analyze_prompt(PROMPT, timeout=20).layers
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert "nobody has read for 0.3 s" in caught.value.details()
        metrics = server.app.metrics.registry
        origin = {"origin": "slow_reader"}
        assert metrics.get_sample_value("griffin_aborts_total", origin) == 1
        assert (
            metrics.get_sample_value("griffin_rejections_total", {"reason": "READER_TOO_SLOW"}) == 0
        )
        assert metrics.get_sample_value("griffin_prompt_tokens_total") == 3000 + len(PROMPT)


def test_a_reader_that_takes_one_now_and_then_holds_its_place_no_longer(
    tiny: Callable[[str], Model],
) -> None:
    """The time that the work waits for its reader is added up."""
    request = pb.AnalyzePromptRequest(text="x" * 3000, activation_layers=[0, 1, 2])
    settings = {"reader_timeout_s": 0.5, "prefill_chunk_tokens": 128}
    with (
        running(tiny("llama-long"), **settings) as server,
        grpc.insecure_channel(server.target, options=SMALL_WINDOW) as channel,
    ):
        call = generation_pb2_grpc.GenerationServiceStub(channel).AnalyzePrompt(request)
        clock = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                time.sleep(1.0)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert time.monotonic() - clock < 60  # it reads what had been sent before the end
        ended = {"origin": "slow_reader"}
        assert server.app.metrics.registry.get_sample_value("griffin_aborts_total", ended) == 1


def test_a_prompt_larger_than_the_memory_is_refused_before_anything_is_sent(
    tiny: Callable[[str], Model],
) -> None:
    with (
        running(tiny("llama-long"), session_memory_gib=1e-6) as server,
        server.client() as client,
        pytest.raises(ResourceExhausted, match="memory: the prompt needs"),
    ):
        client.analyze_prompt("x" * 200)


def test_what_would_have_to_wait_is_refused_where_nothing_may(
    tiny: Callable[[str], Model],
) -> None:
    with (
        running(tiny("llama-long"), prefill_chunk_tokens=1, max_queue=0) as server,
        server.client() as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        long = stub.AnalyzePrompt(pb.AnalyzePromptRequest(text="x" * 4000))
        assert next(long).HasField("started")  # it runs, for thousands of passes
        with pytest.raises(ResourceExhausted, match="queue: 1 pre"):
            client.analyze_prompt("x" * 200)
        long.cancel()


def test_inspect_draws_a_server_and_a_model_alike(
    tiny_server: Running, tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    article = tmp_path / "article.txt"
    article.write_text(PROMPT)
    ways = {
        "server": ["--target", tiny_server.target],
        "model": ["--model", str(tiny_directory("llama"))],
    }
    data = {}
    for way, options in ways.items():
        out = tmp_path / way / "made"
        arguments = ["inspect", f"@{article}", "Another one.", "--out", str(out)]
        result = CliRunner().invoke(app, [*arguments, "--density", "0.5", *options])
        assert result.exit_code == 0, result.output
        pictures = ["flocking-layer-0.png", "flocking-layer-1.png", "flocking-layer-2.png"]
        pictures += ["experts.png", "norm-mass.png", "jaccard.png"]
        assert {path.name for path in out.iterdir()} == {*pictures, "data.npz", "data.json"}
        for picture in pictures:
            with Image.open(out / picture) as image:
                assert image.size == (1200, 600)
        with np.load(out / "data.npz") as arrays:
            data[way] = dict(arrays)
        summary = json.loads((out / "data.json").read_text())
        names = [prompt["name"] for prompt in summary["prompts"]]
        assert names == ["The quick brown fox jumps over the lazy…", "Another one."]
        assert len(summary["jaccard"][0]) == 3
    assert data["server"].keys() == {"s", "experts"} | {f"activations_{n}" for n in range(3)}
    assert data["server"]["s"].shape == (2, 3, 88) and data["server"]["experts"].shape == (2, 3, 44)
    # The model is loaded in the CPU's default dtype, which may be bfloat16; the server has float32.
    np.testing.assert_allclose(data["model"]["s"], data["server"]["s"], rtol=0.1, atol=0.02)


def test_a_prompt_is_no_formula_and_half_of_the_neurons_are_experts_unless_told(
    tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    model = ["--model", str(tiny_directory("llama"))]
    for name in ("flocking-layer-77.png", "jaccard.png", "mine.png"):  # of an earlier time, or not
        (tmp_path / name).touch()
    result = CliRunner().invoke(
        app, ["inspect", r"It cost $\frac$5.", "--out", str(tmp_path), *model]
    )
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "data.npz") as arrays:
        assert arrays["experts"].shape == (1, 3, 44)  # of 88
    assert not (tmp_path / "flocking-layer-77.png").exists()
    assert not (tmp_path / "jaccard.png").exists() and (tmp_path / "mine.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", "7"], "activation_layers[0]"),
        (["--density", "0"], "pruning.density"),
        (["--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_inspect_says_what_is_wrong(
    arguments: list[str], said: str, tiny_server: Running, tmp_path: Path
) -> None:
    options = ["--out", str(tmp_path / "out"), "--target", tiny_server.target, *arguments]
    result = CliRunner().invoke(app, ["inspect", PROMPT, *options])
    assert result.exit_code == 1 and said in result.output
    assert not (tmp_path / "out").exists()


def test_norm_mass_over_density() -> None:
    curve = norm_mass_curve(np.array([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(curve, [[9 / 14, 13 / 14, 1], [1, 1, 1]], rtol=1e-6)


def test_overlap_of_two_sets() -> None:
    one = np.array([[0, 1, 2], [0, 1, 2]], dtype=np.int32)
    other = np.array([[0, 1, 2], [2, 3, 4]], dtype=np.int32)
    np.testing.assert_allclose(jaccard(one, other), [1, 1 / 5])
