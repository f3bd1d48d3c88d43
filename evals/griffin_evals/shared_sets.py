"""Measures the cost in quality of keeping the expert set of a shared group for several steps.

Sessions of different texts join a group one after the other and leave it when their text ends, so
that up to 16 run at once. Each step is run dense, on a set that is chosen again at every
change of the group, and on sets that are kept: chosen at most every 16 steps, and left unchanged in
layers where a new choice would change no more than a share of the neurons. Texts are
teacher-forced. Prints the mean KL divergence from the dense model for each, and one line of JSON.

    python -m griffin_evals.shared_sets --text FILE [FILE ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from griffin_core.engine.expert_group import STEPS_HELD, kept_where_alike, select_group
from griffin_core.engine.session import Session
from griffin_core.experts.selection import Selection
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.forward.events import (
    LayerExperts,
)
from griffin_core.forward.prefill import prefill
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.load import Model, load_model
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.zeroed import ZeroedLayers
from griffin_core.spec.choices import DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
AT_ONCE = 16


@dataclass(kw_only=True)
class Group:
    """A shared group with one rule.

    Args:
        held: the least number of steps for which a set is kept.
        share: the share of a layer's neurons that a new choice must change before the layer
            changes its set.
    """

    held: int
    share: float
    experts: SlimSpec | None = None
    layers: ZeroedLayers | None = None
    chosen: int = -1000
    stale: bool = True
    choices: int = 0
    rewritten: float = 0.0  # layers
    kl: float = 0.0
    tokens: int = 0

    def advance(self, model: Model, members: Sequence[Session], step: int) -> None:
        """Chooses the set again before a step, if that is due."""
        if not self.stale or step - self.chosen < self.held:
            return
        new = select_group(model.decoder, members)
        old = self.experts
        self.experts = new if old is None else kept_where_alike(old, new, self.share)
        if old is not None:
            pairs = zip(old.layers, self.experts.layers, strict=True)
            self.rewritten += sum(not torch.equal(one, other) for one, other in pairs)
            self.choices += 1
        self.layers = ZeroedLayers(model.decoder, self.experts)
        founds = old is None and len(members) == 1
        self.chosen, self.stale = self.chosen if founds else step, False


class Text:
    """A session: a text whose first tokens are the prompt."""

    def __init__(
        self,
        model: Model,
        pools: Sequence[KvPool],
        ids: Sequence[int],
        prompt_tokens: int,
        selection: Selection,
    ) -> None:
        decoder = model.decoder
        self.rest = list(ids[prompt_tokens:])
        first = pools[0].allocate(len(ids))
        events = prefill(decoder, ids[:prompt_tokens], selection, cache=first)
        chosen = [event for event in events if isinstance(event, LayerExperts)]
        self.session = Session("")
        self.session.selection = selection
        sums = torch.stack([event.sums for event in chosen], dim=1)
        self.session.statistics = Statistics(sums=sums, tokens=prompt_tokens)
        layers = [event.experts for event in chosen]
        self.session.slim = SlimSpec.of_layers(decoder.spec.intermediate_size, layers)
        self.caches: list[KvCache] = [first]
        for pool in pools[1:]:
            cache = pool.allocate(len(ids))
            for layer in range(len(decoder.layers)):
                kv = first.slice(layer, 0, prompt_tokens)
                cache.slice(layer, 0, prompt_tokens).copy_(kv)
            cache.advance(prompt_tokens)
            self.caches.append(cache)


@torch.inference_mode()
def measure(
    model: Model,
    texts: Sequence[Sequence[int]],
    prompt_tokens: int,
    every: int,
    density: float,
    groups: Sequence[Group],
) -> None:
    """Runs all texts through all groups.

    Args:
        every: the number of steps between two texts that join.
    """
    decoder, selection = model.decoder, Selection(density=density)
    dense = [layer.ff for layer in decoder.layers]
    tables = [BlockTable(decoder) for _ in groups]
    room = (AT_ONCE + 1) * max(len(text) for text in texts)
    pools = [decoder.new_pool(room) for _ in range(1 + len(groups))]
    waiting, live, step = list(texts), cast(list[Text], []), 0
    while waiting or live:
        joined = None
        if waiting and step % every == 0 and len(live) < AT_ONCE:
            joined = Text(model, pools, waiting.pop(0), prompt_tokens, selection)
            live.append(joined)
        left = [text for text in live if not text.rest]
        live = [text for text in live if text.rest]
        for text in left:
            for cache in text.caches:
                cache.free()
        for group in groups:
            group.stale |= bool(joined or left)
        if live:
            next_ids = [text.rest.pop(0) for text in live]
            exact = run(decoder, live, 0, dense, next_ids, None)
            members = [text.session for text in live]
            for number, group in enumerate(groups):
                group.advance(model, members, step)
                got = run(decoder, live, 1 + number, group.layers, next_ids, tables[number])
                group.kl += float((exact.exp() * (exact - got)).sum())
                group.tokens += len(live)
        step += 1


def run(
    decoder: Any, live: Sequence[Text], number: int, view: Any, ids: Sequence[int], table: Any
) -> torch.Tensor:
    """Returns the log-probabilities [N, V] of a step."""
    steps = [
        StepTokens(cache=text.caches[number], view=view, token_ids=[token])
        for text, token in zip(live, ids, strict=True)
    ]
    logits = torch.cat(decode_tokens(decoder, steps, table))
    return logits.log_softmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    texts = [ROOT / "demo" / "article.txt", ROOT / "LICENSE", Path(__file__)]
    parser.add_argument("--text", type=Path, nargs="+", default=texts, help="UTF-8 files")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="of each text after its prompt")
    parser.add_argument("--windows", type=int, default=8, help="most that are taken of a file")
    parser.add_argument("--every", type=int, default=4, help="steps between two that join")
    parser.add_argument("--share", type=float, nargs="+", default=[0.0, 0.05, 0.1])
    given = parser.parse_args()
    model = load_model(given.model, dtype=torch.float32, progress=print)
    needed = given.prompt_tokens + given.tokens
    samples: list[list[int]] = []
    for path in given.text:
        ids = model.tokenizer.encode(path.read_text(encoding="utf-8"))
        starts = range(0, len(ids) - needed + 1, needed)[: given.windows]
        samples += [ids[at : at + needed] for at in starts]
    groups = {"at every change": Group(held=0, share=0.0)}
    for share in given.share:
        groups[f"every {STEPS_HELD}, {share:g} kept"] = Group(held=STEPS_HELD, share=share)
    measure(model, samples, given.prompt_tokens, given.every, given.density, list(groups.values()))
    base = groups["at every change"]
    results = {}
    print(f"\n{len(samples)} texts, {base.tokens} tokens, density {given.density:g}")
    for name, group in groups.items():
        kl = group.kl / group.tokens
        layers = group.rewritten / max(1, group.choices)
        results[name] = {
            "kl_nats": round(kl, 4),
            "of_every_change": round(group.kl / base.kl, 4),
            "choices": group.choices,
            "layers_rewritten": round(layers, 1),
        }
        print(f"{name:>22}  {results[name]}")
    print(json.dumps({"eval": "shared_sets", "model": model.name, "results": results}))


if __name__ == "__main__":
    main()
