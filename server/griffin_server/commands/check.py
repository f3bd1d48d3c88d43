"""What `griffin check` prints of a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from griffin_core.check import Report, check_model
from griffin_core.errors import InvalidRequest
from griffin_core.model.load import DTYPES

EQUAL, DIFFERS, NOT_COMPARED = 0, 3, 4
"""Exit statuses. 1 is a model that is refused, 2 a wrong use of the command."""

ONLY_NAMES = ("config_ignored", "gguf_keys_read", "gguf_keys_ignored")
"""What is printed without its reasons; --json has them."""


def check_and_print(
    name: str, dtype: str, device: str, *, as_json: bool, progress: Callable[[str], None]
) -> int:
    """Checks a model and prints what came of it.

    Returns:
        The exit status.

    Raises:
        ModelError, DeviceMemoryExhausted, InvalidRequest: the model is refused, or an option.
    """
    if dtype not in DTYPES:
        raise InvalidRequest("dtype", dtype, ", ".join(DTYPES))
    report = check_model(name, dtype=DTYPES[dtype], device=device, progress=progress)
    status, words = _result(report)
    said = {**_said(report), "result": words}
    if as_json:
        print(json.dumps({**said, "status": status}))
    else:
        _print(said)
    return status


def _result(report: Report) -> tuple[int, str]:
    if report.comparison is None:
        return NOT_COMPARED, f"not compared: transformers says {report.not_compared}"
    if report.comparison.equal:
        return EQUAL, "equal"
    return DIFFERS, "differs from transformers"


def _said(report: Report) -> dict[str, Any]:
    """All that is known of the model, name by name."""
    model, gguf = report.model, report.gguf
    spec, tokenizer = model.decoder.spec, model.tokenizer
    said: dict[str, Any] = {
        "model": model.name,
        "family": spec.family,
        "layers": len(spec.layers),
        "width": spec.width,
        "ff_width": spec.ff_width,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "vocabulary": spec.vocabulary,
        "context_length": spec.context_length,
        "dtype": str(model.decoder.dtype).removeprefix("torch."),
        "end_tokens": {token: tokenizer.decode_one(token) for token in sorted(model.eos_ids)},
        "chat_template": tokenizer.no_chat_because or "can be used",
        "config_read": {f.name: f.value for f in report.fields if f.use == "read"},
        "config_ignored": {f.name: f.reason for f in report.fields if f.use == "ignored"},
        "tensors_ignored": report.left_over,
    }
    if gguf is not None:
        said |= {
            "gguf_tensors": gguf.quantization,
            "gguf_keys_read": {name: meaning for name, (_, meaning) in gguf.keys.items()},
            "gguf_keys_ignored": gguf.ignored,
        }
    if (compared := report.comparison) is not None:
        said["compared"] = asdict(compared)
    return said


def _print(said: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in said.items():
        table.add_row(name.replace("_", " "), _words(name, value))
    # rich takes 80 columns for what is no terminal.
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _words(name: str, value: Any) -> str:
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
