"""The speed that a client of a running server sees, with real servers and a client in another
process.

Servers are started with `griffin serve` (in role all, and as separate prefill and decode servers).
One client process measures every number of streams, every sharing, greedy and sampled, through the
asyncio SDK. All of this is set per request, so one server serves all rows of a role.

Milliseconds between tokens are (last - first) / (tokens - 1) of each stream, the median over
streams. A row also has the p99 gap between two messages, the time to the first token (the median,
and that of the last stream) and tokens per second. Each row is compared with the step alone in the
same round (``benchmarks.step_alone``), with the greedy row and the dense row of its kind, and with
vLLM and llama.cpp where ``--python`` names an interpreter that has them.

    python -m benchmarks.served                               # SmolLM2 on the CPU
    python -m benchmarks.served --device cuda --shape Llama-3-8B --prompt-tokens 512

The last line is one JSON object; ``--out`` also writes it, after every round, to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_shapes import SHAPES
from benchmarks.gguf_bf16 import write_bf16
from benchmarks.peer import CUDA_PEERS, PEERS
from benchmarks.peers import Peer, has
from benchmarks.processes import Helper, address, serving, started
from benchmarks.random_model import write_random_model
from benchmarks.report import finish
from benchmarks.served_client import Row
from griffin_core.model.hub import DEFAULT_MODEL, resolve

SAMPLINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_p": 0.9},
    "full": {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    },
}
MODES = ("dense", "private", "shared", "auto")
FORMS_OF = {
    "dense": ("dense",),
    "private": ("private", "dense"),
    "shared": ("shared",),
    "auto": ("dense", "private", "shared"),
}
"""The ways in which a mode may run the FF; a row is compared with the cheapest of them. Private
includes dense: all weights are read once, and activations outside a session's set are zeroed."""

SPLIT_MODES, SPLIT_SAMPLINGS = ("dense", "auto"), ("greedy", "sampled")
"""The rows of separate prefill and decode servers, where only the transport of a prompt's KV
differs."""

RECORDED_VLLM = {
    "greedy": {1: 6.50, 4: 6.76, 16: 7.14, 32: 7.70},
    "sampled": {1: 6.67, 4: 7.21, 16: 7.33, 32: 8.09},
}
"""Milliseconds between tokens of vLLM 0.24, offline, for Llama-3-8B's shape and prompts of 512
tokens, on an H100 that copied ``RECORDED_COPY_TB_PER_S`` (2026-11-25). They are compared only with
rows of the same shape and prompts, scaled by the copy rate of this GPU, and marked as recorded."""
RECORDED_COPY_TB_PER_S = 3.02


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The properties of a row that are the same in all rounds."""

    role: str
    streams: int
    mode: str
    sampling: str

    def __str__(self) -> str:
        return f"{self.role:5} {self.streams:2d} × {self.mode:7} {self.sampling:7}"


class Clock:
    """The time limit of a run.

    Args:
        minutes: rows that would start later are left out; None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._begin = time.monotonic()
        self._end = None if minutes is None else self._begin + 60 * minutes

    def left_s(self) -> float:
        """Returns the seconds left; infinite without a limit."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def say(self, words: str) -> None:
        """Prints a message with the time since the start."""
        print(f"[{time.monotonic() - self._begin:4.0f} s] {words}", flush=True)


class Served:
    """All rows of a run, and the figures to compare them with.

    Args:
        client: the process of ``served_client``.
        alone: the process of ``step_alone``.
    """

    def __init__(self, arguments: argparse.Namespace, client: Helper, alone: Helper) -> None:
        self._arguments = arguments
        self._client = client
        self._alone = alone
        self._rounds: dict[Kind, list[dict[str, float]]] = defaultdict(list)

    def kinds(self, role: str, streams: int) -> Iterator[Kind]:
        """Yields the rows of a role and a number of streams, in the order in which they run."""
        for sampling in self._arguments.sampling:
            for mode in self._arguments.modes:
                if role != "all" and not (mode in SPLIT_MODES and sampling in SPLIT_SAMPLINGS):
                    continue
                yield Kind(role=role, streams=streams, mode=mode, sampling=sampling)

    def run(self, role: str, target: str, until_s: float, clock: Clock) -> None:
        """Runs all rounds of a role's rows, and ends early when only ``until_s`` are left."""
        wanted = self._arguments
        for streams in wanted.streams:  # connections, threads and graphs are warm after it
            for mode in wanted.modes:
                kind = Kind(role=role, streams=streams, mode=mode, sampling="sampled")
                self._client.ask(self._row(kind, target, output_tokens=8, number=99))
        for number in range(wanted.rounds):
            for streams in wanted.streams:
                alone = self._alone.ask(streams)
                steps = {**alone["step_ms"], **alone["graph_ms"]}  # the graph's where there is one
                for kind in self.kinds(role, streams):
                    if clock.left_s() < until_s:
                        clock.say(f"out of time in round {number + 1} of {role}")
                        return
                    row = self._row(kind, target, output_tokens=wanted.output_tokens, number=number)
                    found = self._client.ask(row)
                    found["step_ms"] = min(steps[form] for form in FORMS_OF[kind.mode])
                    found.update({f"step_{name}_ms": ms for name, ms in alone["step_ms"].items()})
                    found.update({f"graph_{name}_ms": ms for name, ms in alone["graph_ms"].items()})
                    self._rounds[kind].append(found)
                    if number == 0:
                        print(f"  {kind}  {found['ms']:7.2f} ms", flush=True)
            if wanted.out is not None:
                wanted.out.write_text(json.dumps(self.rows({})), encoding="utf-8")

    def first_tokens(self, target: str) -> list[dict[str, Any]]:
        """Returns, for dense prompts that arrive together, the milliseconds until the last of them
        has its first token; the median of three rounds."""
        found = []
        for words in self._arguments.first_tokens:
            prompts, tokens = (int(number) for number in words.split("x"))
            kind = Kind(role="all", streams=prompts, mode="dense", sampling="greedy")
            rounds = []
            for number in range(4):  # the first warms up
                row = self._row(kind, target, output_tokens=2, number=1000 + number)
                rounds.append(self._client.ask({**row, "prompt_tokens": tokens}))
            ms = statistics.median(each["last_first_token_ms"] for each in rounds[1:])
            found.append(
                {
                    "prompts": prompts,
                    "tokens": tokens,
                    "last_first_token_ms": round(ms, 1),
                    "prompt_tokens_per_s": round(prompts * tokens / ms * 1e3),
                }
            )
            print(f"  {words}: the last first token after {ms:.1f} ms", flush=True)
        return found

    def _row(self, kind: Kind, target: str, *, output_tokens: int, number: int) -> dict[str, Any]:
        dense = kind.mode == "dense"
        return asdict(
            Row(
                target=target,
                streams=kind.streams,
                prompt_tokens=self._arguments.prompt_tokens,
                output_tokens=output_tokens,
                density=1.0 if dense else self._arguments.density,
                sharing=None if dense else kind.mode,
                sampling=SAMPLINGS[kind.sampling],
                round=number,
            )
        )

    def rows(self, peers: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
        """Returns medians over rounds. Ratios are medians of the ratios within each round, which
        slow changes of the machine do not affect; ratios to peers are not, since peers run
        separately.

        Args:
            peers: milliseconds by name and "STREAMS SAMPLING".
        """
        found = []
        for kind, rounds in self._rounds.items():
            ms = statistics.median(each["ms"] for each in rounds)
            over = {"step": statistics.median(each["ms"] / each["step_ms"] for each in rounds)}
            for name, changed in (("greedy", {"sampling": "greedy"}), ("dense", {"mode": "dense"})):
                other = Kind(**{**asdict(kind), **changed})
                if other != kind and other in self._rounds:
                    pairs = zip(
                        rounds, self._rounds[other], strict=False
                    )  # it may have ended early
                    over[name] = statistics.median(own["ms"] / its["ms"] for own, its in pairs)
            for name, known in peers.items():
                if its_ms := known.get(f"{kind.streams} {kind.sampling}"):
                    over[name] = ms / its_ms
            found.append(
                {
                    **asdict(kind),
                    **{
                        name: round(statistics.median(each[name] for each in rounds), 3)
                        for name in rounds[0]
                    },
                    "rounds": len(rounds),
                    "over": {name: round(ratio, 3) for name, ratio in over.items()},
                }
            )
        return found


def recorded(
    arguments: argparse.Namespace, steps: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Returns the recorded figures of vLLM on another GPU, scaled to this GPU's copy rate."""
    same = (arguments.shape, arguments.prompt_tokens) == ("Llama-3-8B", 512)
    if not same or "copy_gigabytes_per_s" not in steps:
        return {}
    scale = 1e3 * RECORDED_COPY_TB_PER_S / steps["copy_gigabytes_per_s"]
    return {
        "vLLM 0.24 recorded elsewhere, scaled": {
            f"{streams} {sampling}": ms * scale
            for sampling, values in RECORDED_VLLM.items()
            for streams, ms in values.items()
        }
    }


def peer_figures(arguments: argparse.Namespace, model: str, clock: Clock) -> dict[str, Any]:
    """Returns the milliseconds per step of each installed peer, by "STREAMS SAMPLING". The servers
    are stopped before."""
    cuda = arguments.device.startswith("cuda")
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in CUDA_PEERS if cuda else PEERS:
            python = next((p for p in arguments.python if has(p, name)), None)
            if python is None:
                clock.say(f"{name} is not installed in any of {arguments.python}")
                continue
            llama = name == "llama-cpp-python"
            if llama and arguments.model != DEFAULT_MODEL:
                continue  # it takes a GGUF file, which is made of the packaged model alone
            path = Path(directory) / "bf16.gguf"
            if llama:
                write_bf16(path)
            peer = Peer(python, name, str(path) if llama else model)
            try:
                found[peer.name] = _peer_rows(arguments, peer, streams_most=1 if llama else 32)
            finally:
                peer.close()
            clock.say(f"{peer.name}: {found[peer.name]}")
    return found


def _peer_rows(arguments: argparse.Namespace, peer: Peer, *, streams_most: int) -> dict[str, float]:
    found = {}
    for streams in arguments.streams:
        for sampling in arguments.sampling:
            if streams > streams_most or (streams_most == 1 and sampling != "greedy"):
                continue
            seconds = [
                peer.step_s(
                    streams,
                    prompt_tokens=arguments.prompt_tokens,
                    tokens=arguments.output_tokens,
                    sampling=SAMPLINGS[sampling],
                )
                for _ in range(arguments.rounds + 1)  # the first warms up
            ]
            found[f"{streams} {sampling}"] = round(1e3 * statistics.median(seconds[1:]), 3)
    return found


def step_alone(arguments: argparse.Namespace, model: str) -> Helper:
    """Starts a process of ``benchmarks.step_alone``."""
    shape = [] if arguments.shape is None else ["--shape", arguments.shape]
    given = {
        "--model": model,
        "--device": arguments.device,
        "--context": arguments.prompt_tokens + arguments.output_tokens // 2,
        "--density": arguments.density,
        "--most": max(arguments.streams),
    }
    flags = [str(word) for pair in given.items() for word in pair]
    return Helper("benchmarks.step_alone", *flags, *shape)


@contextmanager
def role_all(logs: Path, common: Sequence[str]) -> Iterator[str]:
    """Runs one server for both phases, and yields its address."""
    with serving(*common, log=logs / "all.log") as target:
        yield target


@contextmanager
def apart(logs: Path, common: Sequence[str]) -> Iterator[str]:
    """Runs a prefill and a decode server, and yields the decode server's address."""
    with ExitStack() as stack:
        log = logs / "prefill.log"
        prefill = stack.enter_context(started(*common, "--role", "prefill", log=log))
        target = address(prefill, log)
        yield stack.enter_context(
            serving(
                *common, "--role", "decode", "--prefill-target", target, log=logs / "decode.log"
            )
        )


ROLES = {"all": role_all, "split": apart}


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table."""
    heading = "role  streams mode    sampling   ms/token   p99 gap  first token (last)  tokens/s  "
    print(f"\n{heading}step   as a multiple of")
    for row in rows:
        over = "  ".join(f"{name} {value:.2f}" for name, value in row["over"].items())
        print(
            f"{row['role']:5} {row['streams']:7d} {row['mode']:7} {row['sampling']:8} "
            f"{row['ms']:10.2f} {row['gap_p99_ms']:9.2f} {row['first_token_ms']:8.0f} "
            f"({row['last_first_token_ms']:6.0f}) {row['tokens_per_s']:9.1f} "
            f"{row['step_ms']:6.2f}   {over}"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as `griffin serve` takes it")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of --model")
    parser.add_argument("--model-dir", type=Path, help="keeps the random weights here")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--sampling", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS))
    parser.add_argument("--density", type=float, default=0.5, help="of all modes but dense")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--first-tokens",
        nargs="*",
        default=[],
        metavar="PROMPTSxTOKENS",
        help="also times the first tokens of prompts that arrive together, as 16x512",
    )
    parser.add_argument("--minutes", type=float, help="ends early, with what was measured by then")
    parser.add_argument("--python", action="append", default=[], help="of a peer; may be repeated")
    parser.add_argument("--server", action="append", default=[], help="more of `griffin serve`'s")
    parser.add_argument("--out", type=Path, help="also write the rows here, after every round")
    parser.add_argument("--logs", type=Path, help="keeps the servers' logs in this directory")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    clock = Clock(given.minutes)
    with tempfile.TemporaryDirectory() as scratch:
        logs = given.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        if given.shape is not None:
            model = str(write_random_model(given.shape, given.model_dir or Path(scratch) / "model"))
            clock.say(f"wrote {given.shape}, random weights")
        else:
            model = given.model
        common = ["--device", given.device, "--model", model, *" ".join(given.server).split()]
        with step_alone(given, model) as alone, Helper("benchmarks.served_client") as client:
            steps = alone.answer()
            kind = "copies" if "copy_gigabytes_per_s" in steps else "reads"
            rate = steps.get("copy_gigabytes_per_s") or steps["read_gigabytes_per_s"]
            clock.say(
                f"{kind} {rate} GB/s; ceiling of one session by bytes: {steps['ceiling_ms']} ms"
            )
            served = Served(given, client, alone)
            first_tokens: list[dict[str, Any]] = []
            for index, role in enumerate(given.roles):
                later = len(given.roles) - index - 1
                clock.say(f"starting {role}")
                begin = time.monotonic()
                with ROLES[role](logs, common) as target:
                    start_s = time.monotonic() - begin
                    clock.say(f"{role} serves at {target} after {start_s:.0f} s")
                    if role == "all":
                        first_tokens = served.first_tokens(target)
                    # What comes later needs its start, and time for its own rows.
                    served.run(role, target, 20 + later * (1.5 * start_s + 60), clock)
        where = model
        if given.python and given.shape is None:
            where = resolve(model, torch.bfloat16, print)
        peers = {**peer_figures(given, where, clock), **recorded(given, steps)}
        rows = served.rows(peers)
    print_rows(rows)
    results = {
        "model": given.shape or given.model,
        "on": given.device,
        **{name: steps[name] for name in ("gpu", "copy_gigabytes_per_s") if name in steps},
        "prompt_tokens": given.prompt_tokens,
        "output_tokens": given.output_tokens,
        "density": given.density,
        "cpus": len(os.sched_getaffinity(0)),
        "steps": steps,
        "peers": peers,
        "first_tokens": first_tokens,
        "rows": rows,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(results), encoding="utf-8")
    print()
    finish("served", results)


if __name__ == "__main__":
    main()
