"""`griffin check`: what is understood of a model, and its logits beside transformers'."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from griffin_core.errors import GriffinError, InvalidRequest
from griffin_server.commands.failures import err, fail
from griffin_server.commands.options import AsJson, ModelName
from griffin_server.commands.signals import ended_by_signals

if TYPE_CHECKING:  # it imports torch, which the help does without
    from griffin_core.check import Report

EQUAL, DIFFERS, NOT_COMPARED = 0, 3, 4
"""Exit statuses. 1 means that the model is refused, 2 that the command is used wrongly."""

ONLY_NAMES = ("config_ignored", "gguf_keys_read", "gguf_keys_ignored")
"""The values that are printed without reasons; --json has the reasons."""

app = typer.Typer()


@app.command()
def check(
    model: ModelName,
    dtype: Annotated[
        str, typer.Option(help="Type that both run in: float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Accept weights in pytorch_model.bin.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Report what is understood of a model, and compare its logits with those of transformers.

    The exit status is 0 if they are equal up to rounding, 1 if the model is refused, 3 if they
    differ, and 4 if transformers cannot load these files, so that nothing was compared.
    """
    try:
        with ended_by_signals():
            report = _check(model, dtype, device, allow_pickle=allow_pickle)
            status = _show(report, as_json=as_json)
    except GriffinError as error:
        fail(str(error))
    raise typer.Exit(status)


def _check(name: str, dtype: str, device: str, *, allow_pickle: bool) -> Report:
    """Checks a model.

    Raises:
        ModelError, DeviceMemoryExhausted, InvalidRequest: the model or an option is refused.
    """
    # Imported here because they import torch, which the help does without.
    from griffin_core.check import check_model  # noqa: PLC0415
    from griffin_core.model.load import DTYPES  # noqa: PLC0415

    if dtype not in DTYPES:
        raise InvalidRequest("dtype", dtype, ", ".join(DTYPES))
    return check_model(
        name,
        dtype=DTYPES[dtype],
        device=device,
        allow_pickle=allow_pickle,
        progress=err.print,
    )


def _show(report: Report, *, as_json: bool) -> int:
    """Prints what came of a check.

    Returns:
        The exit status.
    """
    status, result = _result(report)
    values = {**_values(report), "result": result}
    if as_json:
        print(json.dumps({**values, "status": status}))
    else:
        _print(values)
    return status


def _result(report: Report) -> tuple[int, str]:
    if report.comparison is None:
        return NOT_COMPARED, f"not compared: transformers says {report.not_compared}"
    if report.comparison.equal:
        return EQUAL, "equal"
    return DIFFERS, "differs from transformers"


def _values(report: Report) -> dict[str, Any]:
    """What is known about the model, by name."""
    model, gguf = report.model, report.gguf
    spec, tokenizer = model.decoder.spec, model.tokenizer
    values: dict[str, Any] = {
        "model": model.name,
        "family": spec.family,
        "layers": len(spec.layers),
        "width": spec.hidden_size,
        "ff_width": spec.intermediate_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "vocabulary": spec.vocab_size,
        "context_length": spec.context_length,
        "dtype": str(model.decoder.dtype).removeprefix("torch."),
        "end_tokens": {token: tokenizer.decode_one(token) for token in sorted(model.eos_ids)},
        "chat_template": tokenizer.no_chat_because or "can be used",
        "config_read": {f.name: f.value for f in report.fields if f.use == "read"},
        "config_ignored": {f.name: f.reason for f in report.fields if f.use == "ignored"},
        "tensors_ignored": report.left_over,
    }
    if gguf is not None:
        values |= {
            "gguf_tensors": gguf.quantization,
            "gguf_keys_read": {name: meaning for name, (_, meaning) in gguf.keys.items()},
            "gguf_keys_ignored": gguf.ignored,
        }
    if (compared := report.comparison) is not None:
        values["compared"] = asdict(compared)
    return values


def _print(values: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in values.items():
        table.add_row(name.replace("_", " "), _text(name, value))
    # rich assumes 80 columns where there is no terminal.
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _text(name: str, value: Any) -> str:
    if name == "compared":
        return (
            f"with transformers {value['version']} at {value['positions']} positions: logits "
            f"differ by at most {value['difference']:.2g} where the largest is "
            f"{value['largest']:.3g}; the most likely token is the same at {value['agreeing']}"
        )
    if name in ONLY_NAMES:
        return ", ".join(value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    return str(value)
