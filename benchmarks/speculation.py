"""Speculation: what passes over several tokens cost, and what clients of an engine gain.

    python -m benchmarks.speculation --model M [--device cuda] [--texts NAME=FILE.jsonl ...]

First the seconds of a dense pass by its tokens. Then completions whose drafts are accepted with a
given chance by construction (only one token may be drawn, and drafts hold it with that chance),
beside what those costs predict. With texts (lines with a "prompt", "article" or "text"), lookup and
auto against off on their completions, in turn.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.load import Inbox
from benchmarks.report import about, finish
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Finished
from griffin_core.engine.limits import Limits
from griffin_core.engine.speculative_steps import SpeculativeSteps
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.model.load import load_model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.prompt_lookup import PromptLookup
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import SpeculationMode

CHANCES = (0.7, 0.8, 0.9, 0.95)
ROWS = (1, 2, 4, 8, 9, 16)
DRAWN, OTHER = 300, 301
"""The one token that may be drawn, and one that may not."""


def run(
    engine: Engine, tasks: Sequence[GenerateTask], streams: int
) -> tuple[float, list[Finished]]:
    """Runs tasks, ``streams`` at a time; returns the seconds a token took, prompts not counted."""
    waiting, done = list(tasks), []
    running: list[Inbox] = []
    while waiting or running:
        while waiting and len(running) < streams:
            inbox = Inbox()
            engine.submit(waiting.pop(0), inbox)
            running.append(inbox)
        inbox = running.pop(0)
        done.append(inbox.finished())
    decoding = sum(end.timings.decode_s for end in done)
    return decoding / sum(end.generated_tokens - 1 for end in done), done


@contextmanager
def counted() -> Iterator[list[int]]:
    """Yields the number of rows of each step that had a chance to draft, as they come."""
    rows: list[int] = []
    draft = SpeculativeSteps.draft

    def counting(self, stepper, sessions):  # type: ignore[no-untyped-def]
        drafts = draft(self, stepper, sessions)
        rows.append(len(sessions) + sum(len(each.token_ids) for each in drafts.values()))
        return drafts

    with mock.patch.object(SpeculativeSteps, "draft", counting):
        yield rows


def task(
    prompt: Sequence[int], tokens: int, speculation: SpeculationParams, **more: Any
) -> GenerateTask:
    return GenerateTask(
        **{
            "prompt": tuple(prompt),
            "stopping": StoppingParams(max_tokens=tokens, ignore_eos=True),
            "pruning": PruningParams(density=1.0, sharing="private"),
            "speculation": speculation,
            **more,
        }
    )


def cost_of(engine: Engine, density: float) -> Callable[[int], float]:
    """The seconds of a pass by its tokens, all of one session, as the engine measured it."""
    costs = engine._loop.parts.groups.costs

    def seconds(rows: int) -> float:
        if density == 1:
            return costs.step_s(dense=rows, own=(), shared=())
        if rows == 1:
            return costs.step_s(dense=0, own=(density,), shared=())
        return costs.step_s(dense=0, own=(), shared=((density, rows),))

    return seconds


def by_construction(
    engine: Engine, prompt: Sequence[int], density: float, tokens: int, rounds: int
) -> dict[str, Any]:
    """Speed-ups by the chance that a drafted token is accepted, measured and predicted."""
    cost, found = cost_of(engine, density), {}
    for drafted in (3, 8):
        for chance in CHANCES:
            draw = random.Random(1)

            def draft(
                self: PromptLookup, most: int, draw: random.Random = draw, chance: float = chance
            ) -> tuple[int, ...]:
                return tuple(DRAWN if draw.random() < chance else OTHER for _ in range(most))

            def made(mode: SpeculationMode, drafted: int = drafted) -> GenerateTask:
                return task(
                    prompt,
                    tokens,
                    SpeculationParams(mode=mode, draft_tokens=drafted),
                    pruning=PruningParams(density=density, correction="none", sharing="private"),
                    sampling=SamplingParams(allowed_token_ids=frozenset({DRAWN})),
                )

            ratios, passes, made_tokens = [], 0, 0
            with mock.patch.object(PromptLookup, "draft", draft):
                for _ in range(rounds + 1):
                    plain, _ = run(engine, [made("off")], 1)
                    fast, (end,) = run(engine, [made("lookup")], 1)
                    ratios.append(plain / fast)
                    made_tokens += end.generated_tokens - 1
                    passes += end.generated_tokens - 1 - end.speculation.lookup_accepted
            found[f"{drafted} drafted, {chance}"] = {
                "speedup": round(statistics.median(ratios[1:]), 3),
                "predicted": round(made_tokens / passes * cost(1) / cost(drafted + 1), 3),
                "tokens_a_pass": round(made_tokens / passes, 2),
                "plain_ms": round(1e3 * plain, 3),
            }
            print(f"density {density:g}, {drafted} drafted at {chance}:", end=" ")
            print(found[f"{drafted} drafted, {chance}"], flush=True)
    return found


def on_texts(
    engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, streams: int, rounds: int
) -> dict[str, Any]:
    """Speed-ups of lookup and auto over off on the completions of prompts, and what the steps that
    ran were to cost."""
    cost, found = cost_of(engine, 1.0), {}
    for name, sampling in (("greedy", SamplingParams()), ("0.7", SamplingParams(temperature=0.7))):
        times: dict[SpeculationMode, list[float]] = {"off": [], "lookup": [], "auto": []}
        predicted: dict[str, float] = {}
        shares: dict[str, str] = {}
        for turn in range(rounds):
            for mode, own in times.items():
                tasks = [
                    task(
                        prompt,
                        tokens,
                        SpeculationParams(mode=mode),
                        sampling=replace(sampling, seed=number),
                    )
                    for number, prompt in enumerate(prompts)
                ]
                with counted() as rows:
                    ms, done = run(engine, tasks, streams)
                own.append(ms)
                if turn == 0 and mode != "off" and streams == 1:
                    made = sum(end.generated_tokens - 1 for end in done)
                    predicted[mode] = round(made * cost(1) / sum(map(cost, rows)), 3)
                if mode != "off":
                    hits = sum(end.speculation.lookup_accepted for end in done)
                    tried = sum(end.speculation.lookup_drafted for end in done)
                    shares[mode] = f"{hits} of {tried}"
        for mode in ("lookup", "auto"):
            ratios = [off / fast for off, fast in zip(times["off"], times[mode], strict=True)]
            error = statistics.stdev(ratios) / len(ratios) ** 0.5 if rounds > 1 else 0.0
            found[f"{name} {mode}"] = {
                "speedup": round(statistics.mean(ratios), 3),
                "error": round(error, 3),
                "predicted": predicted.get(mode),
                "accepted": shares[mode],
            }
    return found


def texts_of(path: Path) -> list[str]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [each.get("prompt") or each.get("article") or each.get("text") for each in lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--texts", nargs="*", default=[], help="NAME=FILE.jsonl")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="the most of a text")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--density", type=float, nargs="*", default=[1.0, 0.5])
    given = parser.parse_args()
    model = load_model(given.model, device=given.device, progress=print)
    engine = Engine(
        model,
        limits=Limits(max_sessions=16, max_queue=1024, prefill_share=1.0),
        costs=None,
    )
    engine.start()
    engine.ready.result()
    cost = cost_of(engine, 1.0)
    results: dict[str, Any] = {"pass_ms": {rows: round(1e3 * cost(rows), 3) for rows in ROWS}}
    print("ms of a dense pass by its tokens:", results["pass_ms"], flush=True)
    prompt = [5 + (37 * n) % 200 for n in range(128)]
    for density in given.density:
        results[f"density {density:g}"] = by_construction(
            engine, prompt, density, 2 * given.tokens, given.rounds
        )
    for each in given.texts:
        name, _, path = each.partition("=")
        encoded = map(model.tokenizer.encode, texts_of(Path(path))[: given.prompts])
        prompts = [ids[: given.prompt_tokens] for ids in encoded]
        for streams in given.streams:
            found = on_texts(engine, prompts, given.tokens, streams, given.rounds)
            results[f"{name}, {streams} streams"] = found
            print(name, streams, found, flush=True)
    engine.stop()
    finish("speculation", {**about(model), **results})


if __name__ == "__main__":
    main()
