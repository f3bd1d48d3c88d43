"""The study: its measures by hand, its guarded sentences, and the whole of it on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from griffin_core.calibration import forced_text
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    LayerExperts,
)
from griffin_core.forward.prefill import prefill
from griffin_core.model.load import Model
from griffin_evals.study import __main__ as command
from griffin_evals.study import corpus as texts_of
from griffin_evals.study import domains, measures, pictures, reading
from griffin_evals.study.corpus import BadText, load_corpus, load_long
from griffin_evals.study.drift import judged
from griffin_evals.study.estimates import Estimate, band, bootstrap, estimate, paired, unpaired
from griffin_evals.study.lab import cut_texts
from griffin_evals.study.models import Named
from griffin_evals.study.page import page
from griffin_evals.study.prefix import powers_of_two
from griffin_evals.study.sizes import Sizes
from griffin_evals.study.store import Store, write_json
from griffin_evals.study.tradeoff import operating_point
from griffin_evals.study.words import claim, shown

DOCS = Path(__file__).parents[3] / "docs"
TINY = Sizes(
    texts=1,
    prompt_tokens=16,
    continuation_tokens=8,
    long_texts=1,
    long_tokens=32,
    follow_tokens=8,
    generated_tokens=16,
    speed_rounds=2,
    speed_steps=2,
)

# Three tokens on four neurons; the first two agree on neurons 0 and 1.
Z = torch.tensor([[0.8, 0.6, 0.1, 0.0], [0.7, 0.5, 0.2, 0.1], [0.1, 0.9, 0.3, 0.2]])


def test_strongest_marks_each_tokens_k_largest() -> None:
    own = measures.strongest(Z, 2)
    assert own.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, True, True, False],
    ]


def test_strongest_leaves_out_neurons_that_do_not_fire() -> None:
    assert measures.strongest(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), 2).sum() == 1


def test_agreement_and_steady_share_by_hand() -> None:
    own = measures.strongest(Z, 2)
    assert measures.agreement(own, torch.tensor([0, 1])) == pytest.approx(5 / 6)
    assert measures.steady_share(own) == 0.25  # neuron 1 alone is in three of three


def test_the_null_keeps_each_tokens_values_and_breaks_agreement() -> None:
    values = torch.arange(1, 401).float().repeat(300, 1)
    dealt = measures.permuted(values, seed=1)
    assert torch.equal(dealt.sort(dim=1).values, values)
    experts = torch.arange(200, 400)
    assert measures.agreement(measures.strongest(values, 200), experts) == 1
    assert measures.agreement(measures.strongest(dealt, 200), experts) == pytest.approx(
        0.5, abs=0.02
    )
    assert measures.steady_share(measures.strongest(dealt, 200)) == 0


def test_norm_mass_overlap_and_jaccard_by_hand() -> None:
    s2 = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert measures.norm_mass(s2, torch.tensor([[0, 2]])).tolist() == pytest.approx([0.6])
    one = measures.members(torch.tensor([[0, 1], [0, 1]]), 4)
    other = measures.members(torch.tensor([[0, 1], [1, 2]]), 4)
    assert measures.overlap(one, other) == 0.75
    assert measures.jaccard(one, other).tolist() == pytest.approx([1, 1 / 3])
    assert measures.jaccard_of_random_sets(2, 4) == pytest.approx(1 / 3)


def test_divergence_first_choice_and_likelihood_by_hand() -> None:
    dense = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    slim = torch.tensor([[0.25, 0.75], [0.8, 0.2]]).log()
    assert float(measures.divergence(dense, slim)[0]) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )
    assert measures.same_first_choice(dense[1:], slim[1:]).tolist() == [1]
    assert measures.same_first_choice(dense[1:], slim[:1]).tolist() == [0]
    nll = measures.negative_log_likelihood(dense, [0, 1])
    assert nll.tolist() == pytest.approx([math.log(2), math.log(10)])
    assert measures.distinct_share([1, 2, 1, 2, 1, 2], width=2) == pytest.approx(2 / 5)


def test_estimates_are_means_with_the_standard_error_over_texts() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2, 3)
    assert found.se == pytest.approx(1 / math.sqrt(3))
    assert estimate([1.0]).se is None
    assert paired([2.0, 4.0], [1.0, 2.0]) == estimate([1.0, 2.0])
    gap = unpaired(Estimate(mean=5, se=3, n=4), Estimate(mean=1, se=4, n=6))
    assert (gap.mean, gap.se, gap.n) == (4, 5, 4)
    assert band([[1.0, 2.0], [3.0, 2.0]]) == {"mean": [2, 2], "se": [1, 0], "n": 2}
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_a_bootstrap_of_a_mean_finds_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=60)
    mean, error = bootstrap([0] * 60, lambda drawn: values[drawn].mean(keepdims=True))
    assert error is not None
    assert mean[0] == pytest.approx(values.mean())
    assert error[0] == pytest.approx(values.std(ddof=1) / math.sqrt(60), rel=0.15)
    assert bootstrap([0, 0, 1], lambda drawn: values[drawn])[1] is None  # a group of one


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (0.5, "More (+0.500 ± 0.100, n = 9)."),
        (-0.5, "Less (−0.500 ± 0.100, n = 9)."),
        (0.19, "no difference was seen between A and B (+0.190 ± 0.100, n = 9)."),
        (-0.19, "no difference was seen between A and B (−0.190 ± 0.100, n = 9)."),
    ],
)
def test_a_difference_is_claimed_only_beyond_two_standard_errors(mean: float, said: str) -> None:
    difference = Estimate(mean=mean, se=0.1, n=9)
    assert claim(difference, more="More", less="Less", between="A and B") == said


def test_nothing_is_claimed_of_a_single_text() -> None:
    alone = Estimate(mean=100.0, se=None, n=1)
    assert "no difference" in claim(alone, more="More", less="Less", between="A and B")
    assert shown(alone, 1) == "100.0 (error not known)"


def test_a_small_error_is_shown_with_a_digit_that_is_not_zero() -> None:
    assert shown(Estimate(mean=0.5053, se=0.0001, n=9)) == "0.5053 ± 0.0001"
    assert shown(Estimate(mean=0.6, se=0.004, n=9)) == "0.600 ± 0.004"
    assert shown(Estimate(mean=0.6, se=0.04, n=9)) == "0.60 ± 0.04"
    assert shown(Estimate(mean=1.0, se=0.0, n=9)) == "1.00 ± 0.00"


def test_within_and_across_domains_by_hand() -> None:
    # Texts 0 and 1 of one domain, 2 and 3 of another; pairs of a text with itself do not count.
    same = [[1, 0.8, 0.2, 0.2], [0.8, 1, 0.2, 0.2], [0.2, 0.2, 1, 0.6], [0.2, 0.2, 0.6, 1]]
    pairs = np.array(same)[:, :, None].repeat(2, axis=2)
    found = domains.summarize(pairs, [0, 0, 1, 1], ["a", "b"])
    assert found["within"]["mean"] == pytest.approx(0.7)
    assert found["across"]["mean"] == pytest.approx(0.2)
    assert found["within_above_across"]["mean"] == pytest.approx(0.5)
    assert [cell["mean"] for cell in found["matrix"][1]] == pytest.approx([0.2, 0.6])
    assert found["by_layer"]["within"]["mean"] == pytest.approx([0.7, 0.7])


def test_domains_of_one_text_have_no_pairs_within() -> None:
    found = domains.summarize(np.full((2, 2, 1), 0.4), [0, 1], ["a", "b"])
    assert found["within"] is None
    assert found["across"] == {"mean": 0.4, "se": None, "n": 2}
    assert found["by_layer"]["within"]["mean"] == [None]


def test_lengths_and_windows_grow_by_powers_of_two() -> None:
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(20) == [1, 2, 4, 8, 16, 20]
    assert powers_of_two(1) == [1]
    assert judged(29) == [0, 1, 2, 4, 8, 16, 28]
    assert judged(1) == [0]


def test_an_operating_point_needs_all_higher_densities_too() -> None:
    def at(density: float, mean: float) -> dict[str, object]:
        rise = {"mean": mean, "se": 0.01, "n": 9}
        return {"policy": "topk", "density": density, "nll_rise": rise}

    rows = [at(0.9, 0.01), at(0.7, 0.06), at(0.8, 0.30), at(0.6, 0.02)]
    assert operating_point(rows, 0.10) == 0.9
    assert operating_point(rows, 0.50) == 0.6
    assert operating_point(rows, 0.02) is None  # 0.01 + 2 · 0.01 is more than log 1.02


def test_the_shipped_corpus_has_eight_texts_of_five_domains() -> None:
    corpus = load_corpus()
    assert set(corpus) == {"chat", "code", "languages", "mathematics", "news"}
    assert min(len(texts) for texts in corpus.values()) >= 8
    assert sum(len(t.encode()) for texts in corpus.values() for t in texts.values()) < 150_000


def test_a_folder_replaces_domains_of_its_names_and_adds_others(tmp_path: Path) -> None:
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "one.txt").write_text("News.", encoding="utf-8")
    (tmp_path / "law.jsonl").write_text('{"text": "A"}\n\n{"text": "B"}\n', encoding="utf-8")
    corpus = load_corpus(tmp_path)
    assert corpus["news"] == {"one": "News."}
    assert corpus["law"] == {"law-1": "A", "law-3": "B"}
    assert len(corpus["code"]) >= 8
    assert load_long(corpus)["all of law"] == "A\n\nB"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "A"}\n{"words": 1}\n', r"law\.jsonl:2: no JSON object with a field text"),
        (b"text\n", r"law\.jsonl:1: no JSON object"),
        (b'{"text": 5}\n', r"law\.jsonl:1: text is int; allowed: a string"),
        (b"\xff\n", r"law\.jsonl: not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_bytes(content)
    with pytest.raises(BadText, match=words):
        load_corpus(tmp_path)


def test_a_folder_without_texts_and_one_that_is_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadText, match=r"has no DOMAIN/\*\.txt"):
        load_corpus(tmp_path)
    with pytest.raises(BadText, match="allowed: a folder"):
        load_corpus(tmp_path / "none")


def test_too_few_texts_of_a_domain_are_refused_by_its_name(tiny: Callable[[str], Model]) -> None:
    with pytest.raises(BadText, match="law: 1 of its 2 texts have 25 tokens; 2 are needed"):
        cut_texts(
            {"law": {"long": "x" * 25, "short": "x" * 24}},
            tiny("llama").tokenizer,
            Sizes(texts=2, prompt_tokens=16, continuation_tokens=8),
        )


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="texts: got 0; allowed: 1 or more"):
        Sizes(texts=0)


def test_a_large_vocabulary_halves_the_texts() -> None:
    assert Sizes(texts=5, long_texts=10).for_vocabulary(262_144) == Sizes(texts=3, long_texts=5)
    assert Sizes(texts=5).for_vocabulary(49_152) == Sizes(texts=5)


def test_reading_gives_the_statistic_and_experts_of_a_prefill(
    tiny: Callable[[str], Model],
) -> None:
    decoder = tiny("llama").decoder
    ids, selection = list(range(20)), Selection(density=0.5)
    events = prefill(decoder, ids, selection)
    layers = [event for event in events if isinstance(event, LayerExperts)]
    cache = decoder.new_cache(len(ids))
    spans = [reading.read(decoder, part, cache, watch=True) for part in (ids[:7], ids[7:])]
    s2 = spans[0].s2 + spans[1].s2
    assert torch.allclose(s2, torch.stack([layer.s2 for layer in layers]), atol=1e-5)
    chosen = reading.choose(decoder, s2, selection)
    assert torch.equal(chosen, torch.stack([layer.experts for layer in layers]))
    own = spans[1].activations[2].square().sum(dim=0)
    assert torch.allclose(own, spans[1].s2[2], atol=1e-5)


def test_forcing_on_all_neurons_is_reading_and_leaves_the_cache(
    tiny: Callable[[str], Model],
) -> None:
    decoder = tiny("llama").decoder
    cache = decoder.new_cache(20)
    reading.read(decoder, range(12), cache)
    everything = torch.arange(decoder.spec.intermediate_size, dtype=torch.int32)
    view = reading.on_experts(decoder, everything.repeat(len(decoder.layers), 1))
    forced = forced_text.forced(decoder, range(8), cache, view)
    assert cache.length == 12
    hidden = reading.advance(decoder, range(8), cache, view)
    assert cache.length == 20
    cache.rewind(12)
    dense = reading.logprobs_of(decoder, reading.read(decoder, range(8), cache).hidden)
    assert torch.allclose(forced, dense, atol=1e-4)
    assert torch.allclose(reading.logprobs_of(decoder, hidden), dense, atol=1e-4)


def test_greedy_completions_are_the_argmax_tokens_that_end_nothing(
    tiny: Callable[[str], Model],
) -> None:
    model = tiny("llama")
    made = reading.generate(model, [[1, 2, 3], [4, 5, 6, 7]], 4, 0.0, [0, 0])[0]
    ids = [1, 2, 3, *made]
    cache = model.decoder.new_cache(len(ids))
    hidden = reading.read(model.decoder, ids, cache).hidden
    logprobs = reading.logprobs_of(model.decoder, hidden).clone()
    logprobs[:, sorted(model.eos_ids)] = -torch.inf
    assert logprobs[2:-1].argmax(dim=1).tolist() == made


def test_draws_follow_the_probabilities_at_their_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.1, 0.2, 0.7, 0.0]).log() * 0.5
    drawn = [reading.draw(logits, 0.5, generator) for _ in range(3000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert shares.tolist() == pytest.approx([0.1, 0.2, 0.7, 0], abs=0.03)
    assert shares[3] == 0
    assert reading.draw(logits, 0.0, generator) == 2


def test_a_draw_is_repeated_by_its_seed(tiny: Callable[[str], Model]) -> None:
    one, same, other = reading.generate(tiny("llama"), [[1, 2]] * 3, 12, 1.3, [5, 5, 6])
    assert one == same != other


def test_figures_of_other_settings_and_torn_files_count_as_missing(tmp_path: Path) -> None:
    store = Store(tmp_path, {"texts": 1})
    store.save("part", {"a": [1, 2], "b": {"c": None}})
    assert store.load("part") == {"a": [1, 2], "b": {"c": None}}
    assert Store(tmp_path, {"texts": 2}).load("part") is None
    (tmp_path / "part.json").write_text('{"settings": {"texts": 1}, "fig', encoding="utf-8")
    assert store.load("part") is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", {"a": float("nan")})


def test_a_study_that_was_stopped_goes_on_and_writes_its_page(
    tiny: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_of, "ROOT", tmp_path)  # no documents of the repository
    # Loaded once and in float32: kernels of another dtype would be compiled.
    monkeypatch.setattr(command, "load_model", lambda *_, **__: tiny("llama"))
    monkeypatch.setattr(pictures, "DPI", 30)  # and without the layout, which takes seconds
    monkeypatch.setitem(pictures.STYLE, "figure.constrained_layout.use", False)
    corpus = {
        domain: {"text": text}
        for domain, text in (
            ("letters", "a quick brown fox and more"),
            ("digits", "1029384756" * 6),
        )
    }
    said: list[str] = []

    def study(parts: list[str]) -> None:
        command.run(
            [Named(source="tiny", label="Tiny")],
            corpus,
            TINY,
            parts=parts,
            out=tmp_path / "out",
            docs=tmp_path / "docs",
            progress=said.append,
        )

    study(["domains", "flocking"])
    assert "still to measure: causes of Tiny" in said[-1]
    assert not (tmp_path / "docs").exists()

    measured: list[str] = []
    for name, measure in list(command.PARTS.items()):

        def noted(lab, name=name, measure=measure):  # type: ignore[no-untyped-def]
            measured.append(name)
            return measure(lab)

        monkeypatch.setitem(command.PARTS, name, noted)
    study(list(command.PARTS))
    assert measured == ["causes", "prefix", "drift", "temperature", "tradeoff"]

    kept = (tmp_path / "docs" / "study" / "figures.json").read_text(encoding="utf-8")
    written = (tmp_path / "docs" / "STUDY.md").read_text(encoding="utf-8")
    assert written == page(json.loads(kept))
    assert "(error not known)" not in written.split("## Domains")[0].split("## In short")[0]
    drawn = {path.name for path in (tmp_path / "docs" / "study").glob("*.png")}
    named = {line.split("study/")[1][:-1] for line in written.splitlines() if line.startswith("![")}
    assert named == drawn == {f"{name}.png" for name in pictures.PICTURES}

    study(list(command.PARTS))
    assert len(measured) == 5  # nothing is measured twice


def test_the_committed_page_is_what_the_committed_figures_give() -> None:
    figures = json.loads((DOCS / "study" / "figures.json").read_text(encoding="utf-8"))
    assert (DOCS / "STUDY.md").read_text(encoding="utf-8") == page(figures)
    for line in page(figures).splitlines():
        if line.startswith("!["):
            assert (DOCS / line.split("](")[1][:-1]).is_file()
