"""docs/STUDY.md from the figures: every number in it comes from them, and none is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

from griffin_evals.study.causes import KINDS
from griffin_evals.study.drift import TEMPERATURE
from griffin_evals.study.estimates import Estimate, unpaired
from griffin_evals.study.measures import STEADY
from griffin_evals.study.pictures import draw
from griffin_evals.study.sizes import LARGE_VOCABULARY
from griffin_evals.study.store import Figures
from griffin_evals.study.temperature import TEMPERATURES, TEXT
from griffin_evals.study.tradeoff import POINTS, POLICY_DENSITIES, operating_point
from griffin_evals.study.words import cell, claim, of, shown

HALF = 0.5
"""The density at which single figures are given."""

TEMPLATE = Path(__file__).with_name("page.md")
"""The prose, with a $name for each figure, table and sentence that ``words.claim`` makes."""

Values = dict[str, str]


def write_page(figures: Figures, docs: Path) -> None:
    """Writes STUDY.md into a folder, and the pictures into its study/."""
    draw(figures, docs / "study")
    (docs / "STUDY.md").write_text(page(figures), encoding="utf-8")


def page(figures: Figures) -> str:
    """The whole page: the template with its figures filled in."""
    values = _head(figures)
    for section in SECTIONS:
        values |= section(figures["models"])
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _head(figures: Figures) -> Values:
    sizes, machine, models = figures["sizes"], figures["machine"], figures["models"]
    seconds = sum(part["seconds"] for model in models for part in model["parts"].values())
    rows = [
        [
            model["label"],
            str(model["layers"]),
            str(model["ff_width"]),
            str(model["texts"]),
            f"{len(model['long_texts'])} of {model['long_tokens']} tokens",
        ]
        for model in models
    ]
    head = ["model", "layers", "neurons of a layer", "texts", "long texts"]
    long = "; ".join(f"{model['label']}: {', '.join(model['long_texts'])}" for model in models)
    return {
        **{name: str(value) for name, value in (*sizes.items(), *machine.items())},
        "models": " and ".join(model["label"] for model in models),
        "models_table": _table(head, rows),
        "domains": ", ".join(figures["texts"]),
        "domain_count": str(len(figures["texts"])),
        "text_counts": " or ".join(dict.fromkeys(str(model["texts"]) for model in models)),
        "large_vocabulary": f"{LARGE_VOCABULARY:,}",
        "long_texts": long,
        "minutes": f"{seconds / 60:.0f}",
    }


def _summary(models: Sequence[Figures]) -> Values:
    lines = []
    for model in models:
        parts = model["parts"]
        half = _row(parts["tradeoff"], "topk", HALF)
        speed = _speed(parts["tradeoff"], HALF)
        flocking, causes = parts["flocking"], parts["causes"]["above_natural"]
        facts = [
            claim(
                of(flocking["above_null"]["agreement"]),
                more="its tokens flock: they agree more with the prompt's experts than permuted "
                "activations do",
                less="its tokens do not flock: they agree less with the prompt's experts than "
                "permuted activations do",
                between="its tokens and permuted activations",
            ),
            claim(
                of(causes["shuffled"]),
                more="The order of tokens does not cause it: shuffled prompts flock more than "
                "natural ones",
                less="The order of tokens contributes to it: shuffled prompts flock less than "
                "natural ones",
                between="shuffled and natural prompts",
            ),
            claim(
                of(parts["prefix"]["short"]["quarter_above_whole"]),
                more=f"The first {parts['prefix']['short']['of_quarter']} tokens choose worse "
                "experts than the whole prompt, by KL",
                less=f"The first {parts['prefix']['short']['of_quarter']} tokens choose better "
                "experts than the whole prompt, by KL",
                between="the experts of a quarter of the prompt and of all of it",
            ),
            _domain_claim(parts["domains"]),
            claim(
                of(parts["drift"]["generated"]["overlap_change"]),
                more="The last window of a generated text shares more experts with the prompt than "
                "the first",
                less="The last window of a generated text shares fewer experts with the prompt "
                "than the first",
                between="the first and the last window of a generated text, by shared experts",
            ),
            f"Density {HALF:g} costs {cell(half['kl'])} nats of KL, and the most likely next token "
            f"stays the same for a share of {cell(half['top1'])} of the tokens.",
            claim(
                _gain(speed),
                more=f"decode steps at density {HALF:g} make more tokens per second than dense "
                "ones, as a share of the dense rate",
                less=f"decode steps at density {HALF:g} make fewer tokens per second than dense "
                "ones, as a share of the dense rate",
                between=f"the tokens per second of decode steps at density {HALF:g} and of dense "
                "ones, as a share of the dense rate",
            ).replace("n = ", "rounds = "),
        ]
        lines.append(f"- **{model['label']}**: {' '.join(_sentence(fact) for fact in facts)}")
    return {"summary_lines": _lines(lines)}


def _points(models: Sequence[Figures]) -> Values:
    rows, lines = [], []
    for model in models:
        tradeoff = model["parts"]["tradeoff"]
        gains: list[str] = []
        for name, rise in POINTS.items():
            allowed = f"{rise:.0%}"
            density = operating_point(tradeoff["quality"], rise)
            if density is None:
                rows.append([model["label"], name, allowed, "none", *["–"] * 4])
                continue
            at = _row(tradeoff, "topk", density)
            speed = _speed(tradeoff, density)
            gain = _gain(speed)
            if gain.differs and gain.mean > 0:
                gains.append(f"{density:g} ({name})")
            rows.append(
                [
                    model["label"],
                    name,
                    allowed,
                    f"**{density:g}**",
                    _factor(of(at["nll_rise"])),
                    cell(at["kl"]),
                    cell(at["top1"]),
                    cell(speed["speedup"]) + ("" if gain.differs else ", none seen"),
                ]
            )
        verdict = (
            f"a gain was seen at density {' and '.join(gains)}, at the cost shown in the table."
            if gains
            else "no gain was seen at any of these points, for a single stream."
        )
        lines.append(f"- **{model['label']}**: {verdict}")
    head = ["model", "point", "allowed rise", "density", "perplexity", "KL", "same first choice"]
    return {"points_table": _table([*head, "gain"], rows), "points_lines": _lines(lines)}


def _flocking(models: Sequence[Figures]) -> Values:
    rows, lines = [], []
    for model in models:
        flocking = model["parts"]["flocking"]
        for kind, name in (("texts", model["label"]), ("null", "permuted")):
            mean = flocking["mean"][kind]
            rows.append([name, *(cell(mean[m], 3) for m in ("agreement", "norm_mass", "steady"))])
        lines.append(
            f"- **{model['label']}**: "
            + claim(
                of(flocking["early_to_late"]),
                more="the last third of the layers flocks more than the first, by agreement",
                less="the last third of the layers flocks less than the first, by agreement",
                between="the first and the last third of the layers, by agreement",
            )
        )
    if len(models) > 1:
        one, other = models[0], models[1]
        above = [of(m["parts"]["flocking"]["above_null"]["agreement"]) for m in (one, other)]
        lines.append(
            "- **Between models**, by agreement above that of permuted activations: "
            + claim(
                unpaired(*above),
                more=f"{one['label']} flocks more than {other['label']}",
                less=f"{one['label']} flocks less than {other['label']}",
                between="the two",
            )
        )
    head = ["", "agreement", "norm mass", "steady"]
    return {
        "steady": f"{STEADY:.0%}",
        "most_steady": f"{0.5 / STEADY:.0%}",
        "flocking_table": _table(head, rows),
        "flocking_lines": _lines(lines),
    }


def _causes(models: Sequence[Figures]) -> Values:
    rows, lines = [], []
    for model in models:
        causes = model["parts"]["causes"]
        for kind in KINDS:
            found = causes["kinds"][kind]
            kept = "1" if kind == "natural" else cell(found["overlap"])
            agreement, mass = cell(found["agreement"], 3), cell(found["norm_mass"], 3)
            rows.append([model["label"], kind, agreement, mass, kept])
        facts = [
            claim(
                of(causes["above_natural"][kind]),
                more=f"{kind} prompts flock more than natural ones",
                less=f"{kind} prompts flock less than natural ones",
                between=f"{kind} and natural prompts",
            )
            for kind in KINDS[1:]
        ]
        lines.append(f"- **{model['label']}**: {' '.join(_sentence(fact) for fact in facts)}")
    head = ["model", "prompt", "agreement", "norm mass", "experts kept"]
    return {"causes_table": _table(head, rows), "causes_lines": _lines(lines)}


def _prefix(models: Sequence[Figures]) -> Values:
    rows, lines = [], []
    for model in models:
        for kind, of_kind in model["parts"]["prefix"].items():
            if kind == "seconds":
                continue
            tokens = of_kind["tokens"]
            for index in _spread(len(tokens)):
                overlap, kl = _point(of_kind["overlap"], index), _point(of_kind["kl"], index)
                n = str(tokens[index])
                rows.append([model["label"], str(tokens[-1]), n, shown(overlap), shown(kl)])
            fact = claim(
                of(of_kind["quarter_above_whole"]),
                more=f"the first {of_kind['of_quarter']} tokens choose experts with more KL than "
                f"all {tokens[-1]}",
                less=f"the first {of_kind['of_quarter']} tokens choose experts with less KL than "
                f"all {tokens[-1]}",
                between=f"the KL of the first {of_kind['of_quarter']} tokens' experts and that of "
                f"all {tokens[-1]}",
            )
            lines.append(f"- **{model['label']}**, prompts of {tokens[-1]} tokens: {fact}")
    head = ["model", "prompt", "first tokens", "experts of what follows", "KL"]
    return {"prefix_table": _table(head, rows), "prefix_lines": _lines(lines)}


def _drift(models: Sequence[Figures]) -> Values:
    rows, lines = [], []
    for model in models:
        drift = model["parts"]["drift"]
        for kind, name in (("long", "long text"), ("generated", "generated")):
            if kind not in drift:
                continue
            of_kind = drift[kind]
            windows = of_kind["distance"]
            shown_at = of_kind.get("kl_distance") or [windows[i] for i in _spread(len(windows))]
            for index, distance in enumerate(shown_at):
                overlap = shown(_point(of_kind["overlap"], windows.index(distance)))
                kl = shown(_point(of_kind["kl"], index)) if "kl" in of_kind else "–"
                distinct = "–"
                if "distinct" in of_kind:
                    distinct = shown(_point(of_kind["distinct"], windows.index(distance)))
                rows.append([model["label"], name, str(distance), overlap, kl, distinct])
            last = of_kind["distance"][-1]
            fact = claim(
                of(of_kind["overlap_change"]),
                more=f"the window after {last} tokens shares more experts with the prompt than the "
                "first window",
                less=f"the window after {last} tokens shares fewer experts with the prompt than "
                "the first window",
                between=f"the first window and the one after {last} tokens, by shared experts",
            )
            lines.append(f"- **{model['label']}**, {name}: {fact}")
            if "kl_change" in of_kind:
                fact = claim(
                    of(of_kind["kl_change"]),
                    more=f"KL is higher after {last} tokens than right after the prompt",
                    less=f"KL is lower after {last} tokens than right after the prompt",
                    between=f"the KL right after the prompt and {last} tokens later",
                )
                lines.append(f"- **{model['label']}**, {name}: {fact}")
    head = ["model", "windows of", "after tokens", "shared experts", "KL", "distinct"]
    return {
        "drift_temperature": f"{TEMPERATURE:g}",
        "drift_table": _table(head, rows),
        "drift_lines": _lines(lines),
    }


def _domains(models: Sequence[Figures]) -> Values:
    rows, lines = [], []
    for model in models:
        domains = model["parts"]["domains"]
        diagonal = [domains["matrix"][i][i] for i in range(len(domains["domains"]))]
        rows.append(
            [
                model["label"],
                cell(domains["within"], 3),
                cell(domains["across"], 3),
                f"{domains['random']:.3f}",
                *(cell(own) for own in diagonal),
            ]
        )
        fact = _domain_claim(domains)
        across = of(domains["across"])
        above = Estimate(mean=across.mean - domains["random"], se=across.se, n=across.n)
        floor = claim(
            above,
            more="even across domains they share more than random sets",
            less="across domains they share less than random sets",
            between="texts of two domains and random sets",
        )
        lines.append(f"- **{model['label']}**: {fact} {_sentence(floor)}")
    names = models[0]["parts"]["domains"]["domains"]
    head = ["model", "within", "across", "random", *names]
    return {"domains_table": _table(head, rows), "domains_lines": _lines(lines)}


def _domain_claim(domains: Figures) -> str:
    if domains["within_above_across"] is None:
        return "with one text a domain, pairs within and across domains cannot be compared."
    return claim(
        of(domains["within_above_across"]),
        more="two texts of one domain share more experts than texts of different domains",
        less="two texts of one domain share fewer experts than texts of different domains",
        between="pairs of texts within a domain and across domains",
    )


def _temperature(models: Sequence[Figures]) -> Values:
    rows, lines = [], []
    for model in models:
        temperature = model["parts"]["temperature"]
        for kind, found in temperature["kinds"].items():
            name = "own text" if kind == TEXT else f"T = {float(kind):g}"
            values = [cell(found[m]) for m in ("overlap", "norm_mass", "kl", "distinct")]
            rows.append([model["label"], name, *values])
        facts = [
            claim(
                of(temperature["hottest_above_coldest"]["overlap"]),
                more=f"completions at T = {TEMPERATURES[-1]:g} use more of the prompt's experts "
                "than greedy ones",
                less=f"completions at T = {TEMPERATURES[-1]:g} use fewer of the prompt's experts "
                "than greedy ones",
                between=f"T = {TEMPERATURES[-1]:g} and greedy, by shared experts",
            ),
            claim(
                of(temperature["hottest_above_coldest"]["kl"]),
                more=f"KL is higher at T = {TEMPERATURES[-1]:g} than for greedy completions",
                less=f"KL is lower at T = {TEMPERATURES[-1]:g} than for greedy completions",
                between=f"T = {TEMPERATURES[-1]:g} and greedy, by KL",
            ),
        ]
        lines.append(f"- **{model['label']}**: {' '.join(_sentence(fact) for fact in facts)}")
    head = ["model", "completion", "shared experts", "norm mass", "KL", "distinct"]
    return {"temperature_table": _table(head, rows), "temperature_lines": _lines(lines)}


def _tradeoff(models: Sequence[Figures]) -> Values:
    rows, policies, lines = [], [], []
    for model in models:
        tradeoff = model["parts"]["tradeoff"]
        dense = _speed(tradeoff, 1.0)
        perplexity = math.exp(tradeoff["dense_nll"]["mean"])
        rows.append([model["label"], "1", "0", "1", f"{perplexity:.1f}", *_speeds(dense)])
        for at in tradeoff["quality"]:
            if at["policy"] == "topk":
                speed = _speed(tradeoff, at["density"])
                rows.append(
                    [
                        model["label"],
                        f"{at['density']:g}",
                        cell(at["kl"]),
                        cell(at["top1"]),
                        _factor(of(at["nll_rise"])),
                        *_speeds(speed),
                    ]
                )
        for policy in dict.fromkeys(at["policy"] for at in tradeoff["quality"]):
            at_points = [_row(tradeoff, policy, density) for density in POLICY_DENSITIES]
            policies.append([model["label"], policy, *(cell(at["kl"]) for at in at_points)])
            if policy != "topk":
                fact = claim(
                    of(_row(tradeoff, policy, HALF)["kl_above_topk"]),
                    more=f"`{policy}` diverges more than `topk` at density {HALF:g}",
                    less=f"`{policy}` diverges less than `topk` at density {HALF:g}",
                    between=f"`{policy}` and `topk` at density {HALF:g}",
                )
                lines.append(f"- **{model['label']}**: {fact}")
    speed = models[0]["parts"]["tradeoff"]["speed"]
    head = ["model", "density", "KL", "same first choice", "perplexity", "tokens/s", "gain"]
    by_density = [f"{density:g}" for density in POLICY_DENSITIES]
    return {
        "timed_dtype": speed["dtype"],
        "timed_threads": str(speed["threads"]),
        "timed_rounds": str(of(speed["by_density"][0]["tokens_per_s"]).n),
        "tradeoff_table": _table(head, rows),
        "policies_table": _table(["model", "policy", *by_density], policies),
        "policies_lines": _lines(lines),
    }


SECTIONS: tuple[Callable[[Sequence[Figures]], Values], ...] = (
    _summary,
    _points,
    _flocking,
    _causes,
    _prefix,
    _drift,
    _domains,
    _temperature,
    _tradeoff,
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _row(tradeoff: Figures, policy: str, density: float) -> Figures:
    found: Figures = next(
        row for row in tradeoff["quality"] if row["policy"] == policy and row["density"] == density
    )
    return found


def _speed(tradeoff: Figures, density: float) -> Figures:
    rows = tradeoff["speed"]["by_density"]
    found: Figures = next(row for row in rows if row["density"] == density)
    return found


def _gain(speed: Figures) -> Estimate:
    """Returns the gain in tokens per second over dense, as a share of the dense rate."""
    ratio = of(speed["speedup"])
    return Estimate(mean=ratio.mean - 1, se=ratio.se, n=ratio.n)


def _speeds(speed: Figures) -> list[str]:
    gain = "1" if speed["density"] == 1 else cell(speed["speedup"])
    return [cell(speed["tokens_per_s"], 0), gain]


def _factor(rise: Estimate) -> str:
    """A difference of negative log-likelihoods as a factor of the perplexity."""
    low, high = (math.exp(rise.mean + sign * (rise.se or 0.0)) for sign in (-1, 1))
    return f"× {math.exp(rise.mean):.2f} ({low:.2f} to {high:.2f})"


def _point(values: Figures, index: int) -> Estimate:
    return Estimate(mean=values["mean"][index], se=values["se"][index], n=values["n"])


def _spread(count: int, most: int = 6) -> list[int]:
    """Up to ``most`` evenly spaced indices, from the first to the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
