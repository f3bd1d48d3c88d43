"""Decode of SmolLM2 in bfloat16 compared with llama.cpp and vLLM, in turns on one machine.

Peers are searched for in the interpreters given by ``--python`` (`make bench-peers` sets two up)
and run in processes of their own; all sides run the same model, threads and lengths.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.ceiling import step_ceilings_ms
from benchmarks.decode import engine_s
from benchmarks.gguf_bf16 import write_bf16
from benchmarks.load import engine_moments, prompt, step_s
from benchmarks.peer import PEERS
from benchmarks.report import Rounds, about, finish, read_bandwidth
from griffin_core.engine.engine import Engine
from griffin_core.engine.limits import Limits
from griffin_core.model.hub import DEFAULT_MODEL, resolve
from griffin_core.model.load import load_model
from griffin_core.spec.choices import Sharing

PROMPT, TOKENS = 384, 64
MANY = 16
DTYPE = torch.bfloat16


class Peer:
    """A process that runs ``benchmarks/peer.py``."""

    def __init__(self, python: str, name: str, model: str) -> None:
        script = Path(__file__).with_name("peer.py")
        self._process = subprocess.Popen(
            [python, str(script), name, model, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.name = f"{name} {self._answer()}"

    def step_s(
        self,
        sessions: int,
        *,
        prompt_tokens: int = PROMPT,
        tokens: int = TOKENS,
        sampling: Mapping[str, float] | None = None,
    ) -> float:
        """Returns the seconds of a decode step."""
        assert self._process.stdin is not None
        given = "".join(f" {name}={value}" for name, value in (sampling or {}).items())
        self._process.stdin.write(f"{sessions} {prompt_tokens} {tokens}{given}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line.strip()
        raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def has(python: str, name: str) -> bool:
    """Returns whether an interpreter has a package."""
    code = f"import importlib.metadata as m; m.version({name!r})"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def engine_step_s(engine: Engine, density: float, sharing: Sharing) -> float:
    """Returns the seconds of a decode step of many sessions, which are all live at the same
    time."""
    return step_s(
        engine_moments(engine, MANY, PROMPT, 2 * TOKENS, density=density, sharing=sharing)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", default=[], help="may be repeated")
    pythons: list[str] = parser.parse_args(arguments).python
    model = load_model(DEFAULT_MODEL, dtype=DTYPE, progress=print)
    ids = prompt(0, PROMPT)
    cached = PROMPT + TOKENS // 2
    ceiling_ms = step_ceilings_ms(model.decoder, (1.0, 0.5), cached, read_bandwidth())
    print(f"\n{TOKENS} tokens after {PROMPT}, {DTYPE}, {torch.get_num_threads()} threads")
    print(f"ceiling by bytes, one session: {ceiling_ms} ms a step")

    engine = Engine(model, limits=Limits(prefill_share=1.0))  # so that all sessions are soon live
    engine.start()
    candidates: dict[str, Callable[[], float]] = {
        "1 × griffin, dense": lambda: engine_s(engine, ids, 1.0),
        "1 × griffin, density 0.5": lambda: engine_s(engine, ids, 0.5),
        f"{MANY} × griffin, dense": lambda: engine_step_s(engine, 1.0, "private"),
        f"{MANY} × griffin, density 0.5, shared": lambda: engine_step_s(engine, 0.5, "shared"),
    }
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory() as directory:
        gguf = Path(directory) / "bf16.gguf"
        for name in PEERS:
            python = next((python for python in pythons if has(python, name)), None)
            if python is None:
                print(f"{name} is not installed in any of {pythons}")
                continue
            llama = name == "llama-cpp-python"
            if llama:
                write_bf16(gguf)
            peer = Peer(python, name, str(gguf if llama else resolve(DEFAULT_MODEL, DTYPE, print)))
            peers.append(peer)
            candidates[f"1 × {peer.name}"] = lambda peer=peer: peer.step_s(1)  # type: ignore[misc]
            if not llama:
                candidates[f"{MANY} × {peer.name}"] = lambda peer=peer: peer.step_s(MANY)  # type: ignore[misc]
        try:
            rounds = Rounds(candidates, rounds=5)
        finally:
            engine.stop()
            for peer in peers:
                peer.close()

    ms = rounds.median_ms()
    for name, value in ms.items():
        sessions = int(name.split()[0])
        print(f"{name:>40}  {value:7.2f} ms/step  {1e3 * sessions / value:6.1f} tokens/s")
    ratios = {
        f"{peer} / {ours}": rounds.ratio(peer, ours)
        for peer in candidates
        if "griffin" not in peer
        for ours in candidates
        if "griffin" in ours and ours.split()[0] == peer.split()[0]
    }
    print("times as fast:")
    for name, ratio in ratios.items():
        print(f"{ratio:8.2f}  {name}")
    finish(
        "peers",
        {
            **about(model),
            "prompt_tokens": PROMPT,
            "ceiling_ms": ceiling_ms,
            "median_ms": ms,
            "ratios": ratios,
        },
    )


if __name__ == "__main__":
    main()
