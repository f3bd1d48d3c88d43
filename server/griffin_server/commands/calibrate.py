"""`griffin calibrate`: which way of choosing experts loses least on a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from griffin_core.errors import GriffinError, InvalidRequest
from griffin_server.commands.failures import err, fail
from griffin_server.commands.options import AsJson, ModelName
from griffin_server.commands.signals import ended_by_signals

if TYPE_CHECKING:  # it imports torch, which the help does without
    from griffin_core.calibration.calibrate import Calibrated

app = typer.Typer()


@app.command()
def calibrate(
    model: ModelName,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file; repeat it for several. By default the packaged texts."),
    ] = None,
    density: Annotated[
        float, typer.Option(help="The density at which recipes are compared, in (0, 1).")
    ] = 0.5,
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write; by default where a server looks for it."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto for the device's fastest.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure how sensitive a model is to each FF neuron, and which recipe of policy and correction
    loses least on held-out text; servers of the model then use it by default.

    It takes minutes for a model of 135M parameters on two CPU cores.
    """
    try:
        with ended_by_signals():
            _show(_calibrate(model, text, density, output, device, dtype), as_json=as_json)
    except GriffinError as error:
        fail(str(error))


def _calibrate(
    model: str,
    files: list[Path] | None,
    density: float,
    output: Path | None,
    device: str,
    dtype: str,
) -> Calibrated:
    # Imported here because they import torch, which the help does without.
    from griffin_core.calibration.calibrate import calibrate as run  # noqa: PLC0415
    from griffin_core.model.load import DTYPES  # noqa: PLC0415

    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidRequest("dtype", dtype, f"auto, {', '.join(DTYPES)}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=err) as bar:
        task = bar.add_task("loading", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return run(
            model,
            _texts(files),
            density=density,
            output=output,
            device=device,
            dtype=DTYPES.get(dtype),
            progress=progress,
        )


def _texts(files: list[Path] | None) -> list[str]:
    """The texts of the files, a text for each paragraph group of 4,000 characters; else the
    packaged ones.

    Raises:
        InvalidRequest: a file cannot be read.
    """
    if not files:
        from griffin_evals.study.corpus import load_corpus  # noqa: PLC0415  # few need it

        texts = [list(domain.values()) for domain in load_corpus().values()]
        return [text for row in zip(*texts, strict=False) for text in row]
    found = []
    for file in files:
        try:
            whole = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest("text", str(file), f"a text file in UTF-8 ({error})") from error
        found += [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]
    return found


PIECE = 4000
"""The number of characters of a file that count as one text: more than a window has."""


def _show(found: Calibrated, *, as_json: bool) -> None:
    recipe = found.calibration.recipe
    if as_json:
        print(
            json.dumps(
                {
                    "path": str(found.path),
                    "digest": found.calibration.digest,
                    "recipe": asdict(recipe),
                    "windows": found.windows,
                    "compared": [asdict(each) for each in found.compared],
                }
            )
        )
        return
    table = Table("policy", "correction", "KL to dense", "change", box=None, padding=(0, 3, 0, 0))
    for each in sorted(found.compared, key=lambda one: one.kl):
        rank = f" {each.recipe.rank}" if each.recipe.rank else ""
        mark = " *" if each.recipe == recipe else ""
        table.add_row(
            each.recipe.policy + mark,
            each.recipe.correction + rank,
            f"{each.kl:.3f}",
            f"{100 * each.change:+.1f} ± {100 * each.change_error:.1f} %",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"* the model's default, from {found.windows} held-out windows: {found.path}")
