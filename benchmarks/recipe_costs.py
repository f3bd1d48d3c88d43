"""What a recipe costs beyond plain topk: numbers of experts that differ by layer, in a step, and
corrections, until the first token.

    python -m benchmarks.recipe_costs --model M [--device cuda]

Sessions run on one set of half of the neurons, with equal numbers in all layers or from a quarter
to three quarters of them. First tokens are those of new sessions of an engine, in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.load import Inbox, prompt
from benchmarks.report import Rounds, about, finish
from benchmarks.steps import Steps, step_s, steps_of
from griffin_core.backends.base import Layout
from griffin_core.engine.engine import Engine
from griffin_core.engine.limits import Limits
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.policies import largest
from griffin_core.experts.selection import Selection
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import Model, load_model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.slim.views import WholeView
from griffin_core.spec.choices import CorrectionKind

CONTEXT, STEPS, ROUNDS = 512, 16, 9
CORRECTIONS: tuple[CorrectionKind, ...] = ("none", "bias", "residual")


def view_of(steps: Steps, counts: Sequence[int], sessions: int) -> WholeView:
    """A view of random experts, so many of each layer."""
    decoder = steps.decoder
    neurons = decoder.spec.intermediate_size
    score = torch.rand((len(counts), neurons), device=decoder.device)
    slim = SlimSpec(intermediate_size=neurons, counts=tuple(counts), experts=largest(score, counts))
    blocks = []
    if steps.form is not None:
        layout: Layout = "gemv" if sessions == 1 else "gemm"
        pairs = zip(decoder.layers, slim.layers, strict=True)
        blocks = [steps.form.build(layer, experts, layout) for layer, experts in pairs]
    view = WholeView(blocks, slim)
    view.slim_id = steps.slims.add(view)
    return view


@torch.inference_mode()
def by_layer(decoder: Decoder) -> dict[int, float]:
    """The ratio of a step with numbers of experts that differ by layer to one with equal numbers,
    by the number of sessions."""
    layers, neurons = len(decoder.layers), decoder.spec.intermediate_size
    equal = [neurons // 2] * layers
    slope = [neurons // 4 + (neurons // 2) * layer // (layers - 1) for layer in range(layers)]
    found = {}
    capacity = CONTEXT + 2 * STEPS
    steps = steps_of(decoder, sessions=16, tokens=16 * capacity, sets=4)
    caches = [steps.cache(CONTEXT, capacity) for _ in range(16)]
    for sessions in (1, 16):
        views = {"equal": view_of(steps, equal, sessions), "slope": view_of(steps, slope, sessions)}

        def run(view: WholeView, sessions: int = sessions) -> float:
            own = caches[:sessions]
            return step_s(steps.step, own, [view] * sessions, context=CONTEXT, steps=STEPS)

        rounds = Rounds({name: partial(run, view) for name, view in views.items()}, rounds=ROUNDS)
        found[sessions] = rounds.ratio("slope", "equal")
        print(f"{sessions} sessions: {rounds.median_ms()} ms, ratio {found[sessions]}", flush=True)
    return found


def first_tokens(model: Model) -> dict[str, Any]:
    """The time to the first token of a prompt of ``CONTEXT`` tokens by correction, and ratios."""
    engine = Engine(
        model,
        limits=Limits(max_sessions=4, prefill_share=1.0),
        selection=Selection(density=1.0, correction=CorrectionParams(kind="residual", rank=64)),
        costs=None,
    )
    engine.start()
    engine.ready.result()
    number = 0

    def first_s(correction: CorrectionKind) -> float:
        nonlocal number
        number += 1
        task = GenerateTask(
            prompt=tuple(prompt(number, CONTEXT)),
            stopping=StoppingParams(max_tokens=3, ignore_eos=True),
            pruning=PruningParams(density=0.5, sharing="private", correction=correction),
        )
        inbox = Inbox()
        engine.submit(task, inbox)
        return inbox.finished().timings.first_token_s

    rounds = Rounds({kind: partial(first_s, kind) for kind in CORRECTIONS}, rounds=ROUNDS)
    engine.stop()
    ratios = {kind: rounds.ratio(kind, "none") for kind in CORRECTIONS[1:]}
    print(f"first token: {rounds.median_ms()} ms, ratios {ratios}", flush=True)
    return {"ms": rounds.median_ms(), "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    model = load_model(given.model, device=given.device, progress=print)
    first = first_tokens(model)
    ratios = by_layer(model.decoder)
    finish("recipe costs", {**about(model), "first_token": first, "by_layer": ratios})


if __name__ == "__main__":
    main()
