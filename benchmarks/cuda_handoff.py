"""The cost of prefill in another process on one GPU: the time to the first token after 2048 prompt
tokens, for each transport of the KV.

The model has four layers of Llama-2-13B's shape with random weights, so that its KV is large
relative to the time to compute it. Prints first how long the GPU takes to copy that KV.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.cuda_decode import DTYPE, PROMPT, SHAPES, copy_bandwidth
from benchmarks.report import Rounds, finish
from demo.__main__ import server
from griffin_client import Finished, GriffinClient
from griffin_core.model.load import load_model
from tests.servers import running
from tests.tiny import byte_tokenizer

LAYERS, ROUNDS = 4, 9
WAYS = ("auto", "shared_memory", "messages")


def write_model(where: Path) -> int:
    """Writes the model, and returns the bytes of the prompt's KV."""
    family, values = SHAPES["Llama-2-13B"]
    config = CONFIG_MAPPING[family](**{**values, "num_hidden_layers": LAYERS})
    torch.set_default_dtype(DTYPE)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(where)
    byte_tokenizer(with_template=False).save_pretrained(where)
    return 2 * LAYERS * config.hidden_size * PROMPT * DTYPE.itemsize


def first_token_s(client: GriffinClient) -> float:
    """Returns the seconds of a call that generates one token."""
    clock = time.perf_counter()
    *_, last = client.generate(token_ids=range(PROMPT), density=0.5, max_tokens=1, ignore_eos=True)
    assert isinstance(last, Finished)
    return time.perf_counter() - clock


def main() -> None:
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kv_bytes = write_model(where)
        torch.cuda.empty_cache()
        rate = copy_bandwidth()
        torch.cuda.empty_cache()
        ceiling_ms = 2e3 * kv_bytes / rate
        print(f"{torch.cuda.get_device_name()}: {kv_bytes / 1e6:.0f} MB of KV")
        print(f"ceiling: a copy of it takes {ceiling_ms:.2f} ms", flush=True)

        prefill = stack.enter_context(
            server("--role", "prefill", "--model", str(where), "--device", "cuda")
        )
        model = load_model(str(where), dtype=DTYPE, device="cuda")
        clients = {}
        for way in (None, *WAYS):
            settings = {} if way is None else {"role": "decode", "prefill_target": prefill}
            here = running(model, cuda_graphs=False, handoff=way or "auto", **settings)
            clients[way or "one process"] = stack.enter_context(here).client()
        rounds = Rounds(
            {name: lambda client=client: first_token_s(client) for name, client in clients.items()},
            rounds=ROUNDS,
        )
    ms = rounds.median_ms()
    for name, value in ms.items():
        more = value - ms["one process"]
        rest = (
            "" if name == "one process" else f"  +{more:.1f} ms, {kv_bytes / more / 1e6:.1f} GB/s"
        )
        print(f"{name:>14}  {value:7.1f} ms{rest}")
    finish(
        "cuda_handoff",
        {
            "gpu": torch.cuda.get_device_name(),
            "prompt_tokens": PROMPT,
            "kv_megabytes": round(kv_bytes / 1e6),
            "ceiling_ms": round(ceiling_ms, 2),
            "median_ms": ms,
        },
    )


if __name__ == "__main__":
    main()
