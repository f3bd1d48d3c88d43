"""Whether texts of one domain share their experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from griffin_evals.study.estimates import Estimate, Floats, bootstrap, rounded
from griffin_evals.study.lab import Lab
from griffin_evals.study.measures import jaccard, jaccard_of_random_sets, members
from griffin_evals.study.reading import choose, read


def measure(lab: Lab) -> dict[str, Any]:
    """The Jaccard similarity of the experts of pairs of texts, by domain and by layer. Errors come
    from a bootstrap over texts, since pairs that share a text are not independent."""
    decoder = lab.model.decoder
    sets = []
    for text in lab.each_text("domains", lab.domain_texts):
        prompt = lab.prompt(text)
        s2 = read(decoder, prompt, decoder.new_cache(len(prompt))).s2
        sets.append(members(choose(decoder, s2, lab.selection), decoder.spec.intermediate_size))
    names = list(dict.fromkeys(text.domain for text in lab.domain_texts))
    groups = [names.index(text.domain) for text in lab.domain_texts]
    pairs = torch.stack([torch.stack([jaccard(one, other) for other in sets]) for one in sets])
    return {
        "domains": names,
        "random": rounded(jaccard_of_random_sets(lab.experts, decoder.spec.intermediate_size)),
        **summarize(pairs.double().numpy(), groups, names),
    }


def summarize(pairs: Floats, groups: list[int], names: list[str]) -> dict[str, Any]:
    """Means within and across groups.

    Args:
        pairs: [texts, texts, L], the similarity of each pair of texts in each layer.
        groups: the index of each text's domain.
        names: the names of the domains.

    Returns:
        None for each figure that has no pair, such as those within domains of a single text.
    """
    of_text = np.asarray(groups)
    matrix = pairs.mean(axis=2)
    domains = range(len(names))

    def blocks(texts: NDArray[np.int64]) -> Floats:
        """[domains, domains] means over pairs of different texts; nan where there is none."""
        values = matrix[np.ix_(texts, texts)].copy()
        values[texts[:, None] == texts[None, :]] = np.nan
        drawn = of_text[texts]
        return np.array(
            [[_mean(values[np.ix_(drawn == a, drawn == b)]) for b in domains] for a in domains]
        )

    def within_and_across(texts: NDArray[np.int64]) -> Floats:
        """[3]: within, across and their difference; each domain counts the same."""
        values = blocks(texts)
        within = _mean(values.diagonal())
        across = _mean(values[~np.eye(len(names), dtype=bool)])
        return np.array([within, across, within - across])

    def by_layer(texts: NDArray[np.int64]) -> Floats:
        """[2, L]: within and across, of all pairs."""
        values = pairs[np.ix_(texts, texts)]
        drawn = of_text[texts]
        alike = drawn[:, None] == drawn[None, :]
        other = texts[:, None] != texts[None, :]
        return np.array([_mean_rows(values[alike & other]), _mean_rows(values[~alike])])

    n = len(groups)
    table, table_se = bootstrap(groups, blocks)
    whole, whole_se = bootstrap(groups, within_and_across)
    layers, layers_se = bootstrap(groups, by_layer)

    def at(values: Floats, errors: Floats | None, *index: int) -> dict[str, Any] | None:
        if np.isnan(values[index]):
            return None
        se = None if errors is None else float(errors[index])
        return Estimate(mean=float(values[index]), se=se, n=n).to_json()

    return {
        "within": at(whole, whole_se, 0),
        "across": at(whole, whole_se, 1),
        "within_above_across": at(whole, whole_se, 2),
        "matrix": [[at(table, table_se, a, b) for b in domains] for a in domains],
        "by_layer": {
            name: {
                "mean": _known(layers[row]),
                "se": _known(
                    np.full(layers.shape[1], np.nan) if layers_se is None else layers_se[row]
                ),
                "n": n,
            }
            for row, name in enumerate(("within", "across"))
        },
    }


def _known(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else rounded(value) for value in values]


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _mean_rows(values: Floats) -> Floats:
    return values.mean(axis=0) if len(values) else np.full(values.shape[1], np.nan)
