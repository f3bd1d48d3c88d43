"""Writes docs/reference/settings.md from the settings of a server: `make reference`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from page_parts import table

from griffin_server.settings import Settings

PAGE = Path(__file__).with_name("settings.md")

TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false"}
"""Names of types in a JSON schema -> names for people."""

BOUNDS = (
    ("exclusiveMinimum", ">"),
    ("minimum", "≥"),
    ("exclusiveMaximum", "<"),
    ("maximum", "≤"),
)

OTHER_VARIABLES = (
    ("`GRIFFIN_CACHE_DIR`", "where converted models are kept; by default `~/.cache/griffin`"),
    ("`GRIFFIN_TARGET`", "the server that the Python client and the commands call"),
    (
        "`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`",
        "how the threads of a CPU wait for one another; if neither is set, the server sets "
        "`GOMP_SPINCOUNT` to 10000",
    ),
    ("`OTEL_*`", "[traces](../operations/monitoring.md#traces)"),
    (
        "`HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`, `HF_HUB_OFFLINE`",
        "models from a hub, as huggingface_hub reads them",
    ),
)


def page() -> str:
    """The whole page."""
    properties = Settings.model_json_schema()["properties"]
    parts = [
        "# Settings",
        "This page is generated from the code (`make reference`), and a test keeps it fresh. Each "
        "setting of `griffin serve` is a flag, an environment variable and a line of the TOML file "
        "that `--config` names. A flag takes precedence over the environment, and the environment "
        "over the file. In the file a setting has the name of its flag with underscores.",
        table(
            ("flag", "environment variable", "type", "default", "meaning"),
            [_row(name, schema) for name, schema in properties.items()],
        ),
        "## Other environment variables",
        table(("variable", "meaning"), OTHER_VARIABLES),
    ]
    return "\n\n".join(parts) + "\n"


def _row(name: str, schema: dict[str, Any]) -> tuple[str, ...]:
    flag = name.replace("_", "-")
    flags = f"`--{flag}`, `--no-{flag}`" if schema.get("type") == "boolean" else f"`--{flag}`"
    return (
        flags,
        f"`GRIFFIN_{name.upper()}`",
        _type(schema),
        _default(schema["default"]),
        schema.get("description", ""),
    )


def _type(schema: dict[str, Any]) -> str:
    choices = [choice for choice in schema.get("anyOf", []) if choice["type"] != "null"]
    if choices:
        return ", or ".join(map(_type, choices))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"{_type(schema['items'])}; may be repeated"
    if schema.get("format") == "path":
        return "path"
    bounds = [f"{sign} {schema[bound]:,}" for bound, sign in BOUNDS if bound in schema]
    return ", ".join((TYPES[schema["type"]], *bounds))


def _default(value: Any) -> str:
    match value:
        case None | [] | "":
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case _:
            return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}\n")
