"""Measures, and writes docs/STUDY.md with its pictures: `make study`.

    python -m griffin_evals.study [--texts N] [--only PART ...] [--model NAME ...] [--data DIR]

Each part's figures are kept in the folder --out, so that an interrupted study is
resumed. The page is written once all parts of all models are there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from griffin_core.errors import GriffinError
from griffin_core.model.load import load_model
from griffin_evals.study import (
    causes,
    domains,
    drift,
    flocking,
    prefix,
    temperature,
    tradeoff,
)
from griffin_evals.study.corpus import ROOT, BadText, Corpus, load_corpus, load_long
from griffin_evals.study.lab import Lab, Progress, cut_long, cut_texts
from griffin_evals.study.machine import describe_machine
from griffin_evals.study.models import Named, default_models
from griffin_evals.study.page import write_page
from griffin_evals.study.sizes import Sizes
from griffin_evals.study.store import Figures, Store, settings_of, write_json

PARTS: dict[str, Callable[[Lab], Figures]] = {
    "flocking": flocking.measure,
    "causes": causes.measure,
    "prefix": prefix.measure,
    "drift": drift.measure,
    "domains": domains.measure,
    "temperature": temperature.measure,
    "tradeoff": tradeoff.measure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    try:
        corpus = load_corpus(given.data)
        models = [Named(source=name, label=Path(name).name) for name in given.model or ()]
        run(
            models or default_models(_print),
            corpus,
            Sizes(texts=given.texts),
            parts=given.only or list(PARTS),
            out=given.out,
            docs=given.docs,
            progress=_print,
        )
    except (BadText, GriffinError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command goes on with what is kept in {given.out}")


def run(
    models: Sequence[Named],
    corpus: Corpus,
    sizes: Sizes,
    *,
    parts: Sequence[str],
    out: Path,
    docs: Path,
    progress: Progress,
) -> None:
    """Measures the parts that are missing, then writes the page once none is.

    Args:
        parts: names in ``PARTS``.
        out: the folder for the figures of the parts.
        docs: where STUDY.md, and study/ with pictures and all figures, are written.
    """
    long = load_long(corpus)
    measured: list[Figures] = []
    missing: list[str] = []
    for named in models:
        lab = _lab(named, corpus, long, sizes, progress)
        store = Store(out / named.label.replace(" ", "-").lower(), settings_of(lab))
        kept: Figures = {}
        for part, measure in PARTS.items():
            figures = store.load(part)
            if figures is None and part in parts:
                began = time.monotonic()
                figures = measure(lab)
                figures["seconds"] = round(time.monotonic() - began, 1)
                store.save(part, figures)
                progress(f"{named.label}: {part} took {figures['seconds']:.0f} s")
            if figures is None:
                missing.append(f"{part} of {named.label}")
            else:
                kept[part] = figures
        measured.append(_described(named, lab) | {"parts": kept})
    if missing:
        progress(f"no page yet; still to measure: {', '.join(missing)}")
        return
    domains_of = {name: len(texts) for name, texts in corpus.items()}
    figures = {
        "sizes": vars(sizes),
        "texts": domains_of,
        "machine": describe_machine(),
        "models": measured,
    }
    (docs / "study").mkdir(parents=True, exist_ok=True)
    write_json(docs / "study" / "figures.json", figures)
    write_page(figures, docs)
    progress(f"wrote {docs / 'STUDY.md'}")


def _lab(
    named: Named, corpus: Corpus, long: dict[str, str], sizes: Sizes, progress: Progress
) -> Lab:
    model = load_model(named.source, dtype=torch.float32, progress=progress)
    whole, sizes = sizes, sizes.for_vocabulary(model.decoder.spec.vocab_size)
    room = model.decoder.spec.context_length - sizes.follow_tokens - 1
    long_tokens = min(sizes.long_tokens, room)
    needed = long_tokens + sizes.follow_tokens + 1
    return Lab(
        model=model,
        texts=cut_texts(corpus, model.tokenizer, sizes),
        domain_texts=cut_texts(corpus, model.tokenizer, whole),
        long_texts=cut_long(long, model.tokenizer, needed, sizes.long_texts),
        long_tokens=long_tokens,
        sizes=sizes,
        timed=lambda: load_model(named.source, progress=progress),
        progress=lambda line: progress(f"{named.label}: {line}"),
    )


def _described(named: Named, lab: Lab) -> Figures:
    spec = lab.model.decoder.spec
    return {
        "label": named.label,
        "name": lab.model.name,
        "fingerprint": lab.model.fingerprint,
        "layers": len(spec.layers),
        "ff_width": spec.intermediate_size,
        "texts": len(lab.texts),
        "long_texts": [text.name for text in lab.long_texts],
        "long_tokens": lab.long_tokens,
    }


def _print(line: str) -> None:
    """Shows progress: overwrites the line before on a terminal, else prints a line each time."""
    if sys.stdout.isatty() and ": text" in line:
        print(f"\r\033[K{line}", end="", flush=True)
    elif ": text" not in line:
        print(f"\r\033[K{line}" if sys.stdout.isatty() else line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=Sizes.texts, help="texts of each domain")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="parts to measure")
    parser.add_argument("--model", nargs="+", help="names, directories or .gguf files")
    parser.add_argument("--data", type=Path, help="a folder with a folder of texts by domain")
    parser.add_argument("--out", type=Path, default=Path("build/study"), help="figures of parts")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    return parser


if __name__ == "__main__":
    main()
