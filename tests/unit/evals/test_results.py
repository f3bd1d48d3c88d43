"""Statistics by hand, and the tables and pictures that are made of cells."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib import pyplot as plt

from griffin_evals.cells import (
    DENSE_SETTING,
    DIVERGENCE,
    SPEED,
    Cell,
    Cells,
    Identity,
    Measured,
    Setting,
)
from griffin_evals.paired import Estimate, mean_of, mean_over_tasks, paired
from griffin_evals.pictures import draw_panel
from griffin_evals.report import write_report
from griffin_evals.results import KL, TASKS, Group, groups_of
from griffin_evals.tasks import metrics
from griffin_evals.tasks.errors import EvaluationError


def test_a_mean_has_the_error_of_independent_values() -> None:
    estimate = mean_of([1.0, 0.0, 1.0, 1.0])  # s² = 0.25, s/√4 = 0.25
    assert (estimate.mean, estimate.stderr) == (0.75, 0.25)
    assert mean_of([0.5]) == Estimate(mean=0.5, stderr=None)


def test_differences_are_paired_by_document() -> None:
    dense, pruned = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    estimate = paired(pruned, dense)  # 0 -1 0 0 0 -1: mean -1/3, s² = 4/15, s/√6 = √(2/45)
    assert estimate.mean == pytest.approx(-1 / 3)
    assert estimate.stderr == pytest.approx(math.sqrt(2 / 45))
    assert not estimate.claimed  # 1.58 errors
    with pytest.raises(ValueError, match="longer"):
        paired(pruned[:-1], dense)


def test_a_difference_is_claimed_beyond_two_errors_only() -> None:
    assert Estimate(mean=-0.21, stderr=0.1).claimed
    assert not Estimate(mean=0.2, stderr=0.1).claimed
    assert not Estimate(mean=9.0, stderr=None).claimed
    assert not Estimate(mean=0.0, stderr=0.0).claimed


def test_tasks_have_equal_weights_and_errors_add_in_squares() -> None:
    mean = mean_over_tasks([Estimate(mean=0.1, stderr=0.03), Estimate(mean=0.3, stderr=0.04)])
    assert mean.mean == pytest.approx(0.2)
    assert mean.stderr == pytest.approx(0.025)
    assert mean_over_tasks([Estimate(mean=1.0, stderr=None)] * 2).stderr is None


def test_measures_of_answers_by_hand() -> None:
    def document(*references: str) -> dict[str, list[str]]:
        return {"references": list(references)}

    rouge = metrics.rouge(document("the cat sat"), [" the cats sat down\n"])
    assert rouge["rouge1"] == pytest.approx(6 / 7)  # stemmed: 3 of 3 and of 4
    assert rouge["rouge2"] == pytest.approx(4 / 5)
    assert rouge["rougeL"] == pytest.approx(6 / 7)
    f1 = metrics.best_f1(document("no", "a red boat"), ["The red boats\nand more"])
    assert f1["f1"] == pytest.approx(0.5)  # {red boats} beside {red boat}
    both = metrics.conversation(document("red", "a red one"), ["Red."])
    assert both["f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert both["em"] == pytest.approx(0.5)
    assert metrics.final_number(document("1200"), ["so\n#### 1,200."]) == {"exact_match": 1.0}
    assert metrics.final_number(document("12"), ["it is 12"]) == {"exact_match": 0.0}
    assert metrics.last_word({}, [(-2.0, True)]) == {"acc": 1.0, "perplexity": 2.0}
    window = {"continuation": " of four words here"}
    assert metrics.nats_per_word(window, [(-8.0, False)]) == {"word_perplexity": 2.0}
    assert metrics.exp_of_mean([1.0, 3.0]) == pytest.approx(math.exp(2))


def identity(task: str, setting: Setting, **others: object) -> Identity:
    values: dict[str, object] = {
        "model": "models/boat",
        "fingerprint": "f",
        "way": "in process",
        "dtype": "float32",
        "content": "c",
        "limit": None,
        "seed": 0,
        "lm_eval": "0",
    }
    return Identity(task=task, setting=setting, **{**values, **others})  # type: ignore[arg-type]


def cell(task: str, setting: Setting, items: Sequence[float], **others: object) -> Cell:
    mean = mean_of(items)
    perplexity = task == "wikitext"
    measured = Measured(
        value=math.exp(mean.mean) if perplexity else mean.mean,
        stderr=mean.stderr,
        higher_is_better=task not in ("wikitext", DIVERGENCE),
        perplexity=perplexity,
        items=items,
    )
    name = {"wikitext": "word_perplexity", DIVERGENCE: "kl", SPEED: "tokens_per_second"}
    measures = {name.get(task, "acc"): measured}
    return Cell(identity=identity(task, setting, **others), measures=measures, figures={})


def half(policy: str, density: float = 0.5) -> Setting:
    return Setting(mode="generation", density=density, policy=policy)


ONES, MOST, FEW = [1.0] * 8, [1.0] * 6 + [0.0] * 2, [1.0] + [0.0] * 7

CELLS = [
    cell("piqa", DENSE_SETTING, ONES),
    cell("piqa", half("topk"), MOST),
    cell("piqa", half("random"), FEW),
    cell("piqa", half("topk", 0.75), ONES),
    cell("boolq", DENSE_SETTING, MOST),
    cell("boolq", half("topk"), MOST),
    cell("boolq", half("random"), FEW),
    cell("boolq", half("topk", 0.75), MOST),
    cell("wikitext", DENSE_SETTING, [2.0, 2.5, 3.0]),
    cell("wikitext", half("topk"), [2.1, 2.6, 3.2]),
    cell(DIVERGENCE, half("topk"), [0.5, 0.6, 0.7]),
    cell(DIVERGENCE, half("random"), [5.5, 5.7, 5.6]),
    cell(SPEED, DENSE_SETTING, [10.0, 11.0, 12.0]),
    cell(SPEED, half("topk"), [13.0, 14.0, 15.0]),
]


def only(cells: Sequence[Cell]) -> Group:
    (group,) = groups_of(cells)
    return group


def test_the_mean_over_tasks_is_paired_and_leaves_perplexities_out() -> None:
    group = only(CELLS)
    assert group.mean_tasks("generation") == ["boolq", "piqa"]
    dense, high, low, random = group.means("generation")
    assert dense.setting == DENSE_SETTING
    assert (dense.score.mean, dense.difference) == (0.875, None)
    assert high.difference == Estimate(mean=0.0, stderr=0.0)
    assert low.difference is not None
    assert low.difference.mean == pytest.approx(-0.125)  # -2/8 and 0
    assert low.difference.stderr == pytest.approx(math.sqrt(3 / 14 / 8) / 2)
    assert random.setting.policy == "random"


def test_a_setting_without_all_tasks_has_no_mean() -> None:
    group = only([c for c in CELLS if c.identity != identity("boolq", half("topk", 0.75))])
    assert half("topk", 0.75) not in [mean.setting for mean in group.means("generation")]


def test_policies_are_compared_with_the_better_one_first() -> None:
    tasks, kl = only(CELLS).comparisons()
    assert (tasks.by, tasks.density, tasks.policies) == (TASKS, 0.5, ("topk", "random"))
    assert tasks.advantage.mean == pytest.approx(5 / 8)
    assert str(tasks) == f"topk better than random: +0.625 ± {tasks.advantage.stderr:.3f}"
    assert kl.by == KL
    assert kl.advantage.mean == pytest.approx(5.0)
    assert str(kl) == f"topk better than random: +5.000 ± {kl.advantage.stderr:.3f}"
    swapped = [cell("piqa", half("topk"), FEW), cell("piqa", half("random"), MOST)]
    (comparison,) = only(swapped).comparisons()
    assert str(comparison).startswith("topk worse than random: -0.625 ± ")
    (same,) = only([cell("piqa", half(p), MOST) for p in ("topk", "random")]).comparisons()
    assert str(same) == "topk and random: no difference shown (+0.000 ± 0.000)"


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"limit": 5},
        {"fingerprint": "g"},
        {"way": "server"},
        {"dtype": "bfloat16"},
        {"lm_eval": "1"},
    ],
)
def test_other_settings_are_other_cells_and_are_never_compared(
    other: dict[str, object], tmp_path: Path
) -> None:
    cells = Cells(tmp_path)
    cells.put(cell("piqa", DENSE_SETTING, ONES))
    assert cells.get(identity("piqa", DENSE_SETTING)) is not None
    assert cells.get(identity("piqa", DENSE_SETTING, **other)) is None
    cells.put(cell("piqa", DENSE_SETTING, FEW, **other))
    assert len(groups_of(cells.all())) == 2


def test_a_report_is_on_the_documents_that_were_last_asked_for(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells")
    old, new = (cell("piqa", half("topk"), FEW, content=content) for content in ("c", "d"))
    other = cell("boolq", half("topk"), FEW)
    for each in (old, new, other):
        cells.put(each)
    cells.report_on({"piqa": "d"})
    assert sorted(map(repr, cells.all())) == sorted(map(repr, [new, other]))
    cells.report_on({"piqa": "c", "copa": "e"})
    assert sorted(map(repr, cells.all())) == sorted(map(repr, [old, other]))
    (tmp_path / "contents.json").write_text("[")
    with pytest.raises(EvaluationError, match=r"contents.json: is damaged"):
        cells.all()


def test_cells_come_back_as_they_went(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    for each in CELLS:
        cells.put(each)
    assert sorted(map(repr, cells.all())) == sorted(map(repr, CELLS))
    assert not list(tmp_path.glob(".*"))


def test_what_could_not_be_written_whole_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Cells(tmp_path).put(CELLS[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[]", '{"identity": {"setting": {}}, "measures": []}'])
def test_a_damaged_cell_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"broken.json: is not a cell"):
        Cells(tmp_path).all()


def test_tables_claim_only_what_is_beyond_two_errors(tmp_path: Path) -> None:
    for each in CELLS:
        Cells(tmp_path / "cells").put(each)
    files = write_report(tmp_path)
    text = (tmp_path / "results.md").read_text()
    piqa = text.split("### piqa\n")[1].split("###")[0]
    assert "| 1 | dense | 8 | 1.000 ± 0.000 |  |" in piqa
    assert "| 0.75 | topk | 8 | 1.000 ± 0.000 | +0.000 ± 0.000 |" in piqa
    assert "| 0.5 | topk | 8 | 0.750 ± 0.164 | -0.250 ± 0.164 |" in piqa
    assert "| 0.5 | random | 8 | 0.125 ± 0.125 | **-0.875 ± 0.125** |" in piqa
    assert "density 0.5, mean over tasks (generation): topk better than random: +0.625" in text
    assert "density 0.5, KL, nats: topk better than random: +5.000" in text
    for file in files:
        assert file.exists()
        assert file.suffix != ".png" or f"({file.name})" in text

    said = json.loads((tmp_path / "results.json").read_text())
    (group,) = said["groups"]
    low = next(
        c for c in group["cells"] if c["task"] == "piqa" and c["setting"]["policy"] == "random"
    )
    difference = low["measures"]["acc"]["difference_to_dense"]
    assert difference == {"mean": -0.875, "stderr": 0.125, "beyond_two_errors": True}
    assert low["n"] == 8
    assert "items" not in low["measures"]["acc"]


def test_models_of_one_name_have_their_own_pictures(tmp_path: Path) -> None:
    for fingerprint in ("f", "g"):
        for setting in (DENSE_SETTING, half("topk")):
            one = cell("piqa", setting, MOST, fingerprint=fingerprint)
            Cells(tmp_path / "cells").put(one)
    write_report(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.count("(boat-0-generation.png)") == text.count("(boat-1-generation.png)") == 1


def test_pictures_are_readable_at_the_width_of_a_page(tmp_path: Path) -> None:
    for each in CELLS:
        Cells(tmp_path / "cells").put(each)
    pictures = [path for path in write_report(tmp_path) if path.suffix == ".png"]
    assert [path.name for path in pictures] == [
        "boat-0-generation.png",
        "boat-0-generation-tasks.png",
    ]
    for path in pictures:
        pixels = image.imread(path)
        assert 1200 <= pixels.shape[1] <= 1400  # 11 points are then 11 pixels at 800
        assert pixels[..., :3].std() > 0.05


def test_a_logarithmic_axis_shows_its_values_and_not_the_zero_of_dense() -> None:
    _, axes = plt.subplots()
    points = {half("topk"): mean_of([0.4, 0.5]), half("random"): mean_of([20.0, 21.0])}
    draw_panel(axes, ("KL from dense", "KL, nats a token", points, mean_of([0.0])))
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert 0.1 < low < 0.45
    assert 20 < high < 100
    plt.close()


def test_an_empty_directory_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="holds no cells"):
        write_report(tmp_path)
