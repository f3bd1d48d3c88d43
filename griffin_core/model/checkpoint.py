"""Checks the tensors of a checkpoint against the model.

A checkpoint must be complete: it must hold every tensor of the model with the right shape, and
every tensor that it holds must be used, except for those that ``LEFT_OVER`` names.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open

from griffin_core.errors import BadModelFile, listed
from griffin_core.model.files import one_line, read_json_object

STORED_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
)
"""The types that weights may be stored in. They are converted to the type that the model runs in.
Other types (F8_E4M3, I8, U8, ...) are quantized, and cannot be read without their scales and
layout."""

LEFT_OVER: Mapping[str, str] = MappingProxyType(
    {
        r"(^|\.)rotary_emb\.inv_freq$": "made from the config's rope_parameters",
        r"(^|\.)position_ids$": "counted, not learned",
    }
)
"""Pattern of tensor names -> why a checkpoint may hold such tensors though the model does not use
them."""

_SINGLE = ("model.safetensors", "pytorch_model.bin")

_LFS_POINTER = b"version https://git-lfs"

_SCALES = re.compile(r"scale|zero_point|zeros|qweight|g_idx|absmax|quant|packed|lora_")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The description of a tensor in a checkpoint.

    Args:
        dtype: its type as safetensors spells it, such as "BF16"; torch's name for types that
            safetensors lacks.
        file: the name of the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str


def stored_tensors(directory: Path, *, allow_pickle: bool = False) -> dict[str, StoredTensor]:
    """Lists the tensors, by name, of the checkpoint that transformers would load from a directory.

    Args:
        allow_pickle: whether the files may be pickles, which are programs. torch runs only the few
            instructions that make tensors (``weights_only``), but errors in that were exploitable.

    Raises:
        BadModelFile: there is no checkpoint, one of its files is missing, damaged or a pickle
            though those are not allowed, or a tensor is stored twice or in a type that is not in
            ``STORED_DTYPES``.
    """
    tensors: dict[str, StoredTensor] = {}
    bare: dict[str, str] = {}
    files = _files(directory)
    pickles = [path.name for path in files if path.suffix != ".safetensors"]
    if pickles and not allow_pickle:
        raise BadModelFile(
            f"{pickles[0]}: is a pickle, which is a program; allowed: safetensors. If you "
            "trust its author: `griffin serve` and `griffin check` with --allow-pickle, and LLM "
            "and load_model with allow_pickle=True"
        )
    for path in files:
        for name, tensor in _tensors_of(path).items():
            other = bare.setdefault(_bare(name), name)
            if other in tensors:
                raise BadModelFile(
                    f"{path.name}: {name!r} is stored twice, as {other!r} in {tensors[other].file}"
                )
            tensors[name] = tensor
    if odd := {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype not in STORED_DTYPES and left_over(name) is None
    }:
        raise BadModelFile(
            f"weights have unsupported types, perhaps quantized ones: {_listed(odd)}; "
            f"allowed: {', '.join(STORED_DTYPES)}"
        )
    return tensors


def left_over(name: str) -> str | None:
    """Returns why a checkpoint may hold a tensor that the model does not use; None if it may
    not."""
    return next((why for pattern, why in LEFT_OVER.items() if re.search(pattern, name)), None)


def check_complete(
    stored: Mapping[str, StoredTensor],
    taken: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
) -> None:
    """Refuses a checkpoint whose tensors are not exactly those of the model.

    Args:
        stored: see ``stored_tensors``.
        taken: the model's tensors by name; only their shapes matter.
        tied: pairs of names for one tensor; the checkpoint needs only one of each pair.

    Raises:
        BadModelFile: the checkpoint differs; the message names the tensors.
    """
    names = {_bare(name): name for name in stored}
    there = {name for name in taken if _bare(name) in names}
    there |= {a for pair in tied.items() for a in pair if not there.isdisjoint(pair)}
    wrong = []
    if absent := sorted(taken.keys() - there):
        wrong.append(f"lacks tensors: {listed([f'{n} {_shape(taken[n].shape)}' for n in absent])}")
    found = {name: stored[names[_bare(name)]].shape for name in taken if _bare(name) in names}
    if differing := sorted(n for n, shape in found.items() if shape != tuple(taken[n].shape)):
        shapes = [f"{n} {_shape(found[n])} for {_shape(taken[n].shape)}" for n in differing]
        wrong.append(f"shapes differ from the config's: {listed(shapes)}")
    known = {_bare(name) for name in taken}
    if extra := {
        name: tensor
        for name, tensor in stored.items()
        if _bare(name) not in known and left_over(name) is None
    }:
        scales = " (of quantized weights or adapters?)" if any(map(_SCALES.search, extra)) else ""
        wrong.append(f"tensors that the model does not take{scales}: {_listed(extra)}")
    if wrong:
        raise BadModelFile(f"the checkpoint is not the model: {'; '.join(wrong)}")


def _files(directory: Path) -> list[Path]:
    """Returns the files of the checkpoint, which are searched for in the same order as in
    transformers."""
    for single in _SINGLE:
        if (directory / single).is_file():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if not index.is_file():
            continue
        said = read_json_object(index)
        shards = said.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise BadModelFile(f"{index.name}: weight_map is not an object from tensors to files")
        if not isinstance(said.get("metadata"), dict):
            raise BadModelFile(f"{index.name}: metadata is not an object; an empty one will do")
        names = sorted(set(shards.values()))
        if lacking := [name for name in names if not (directory / name).is_file()]:
            raise BadModelFile(f"{index.name}: files are missing: {listed(lacking)}")
        return [directory / name for name in names]
    raise BadModelFile(
        f"cannot read the weights: got none; allowed: {_SINGLE[0]} or, with --allow-pickle, "
        f"{_SINGLE[1]}, or their shards with an index"
    )


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    try:
        if path.suffix == ".bin":
            return _tensors_of_pickle(path)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no dict
            return {
                name: StoredTensor(dtype=s.get_dtype(), shape=tuple(s.get_shape()), file=path.name)
                for name, s in slices.items()
            }
    except BadModelFile:
        raise
    except Exception as error:  # safetensors, torch and pickle each raise errors of their own
        if _is_lfs_pointer(path):
            raise BadModelFile(
                f"{path.name}: is a Git LFS pointer, not the file; `git lfs pull` fetches the file"
            ) from error
        raise BadModelFile(
            f"{path.name}: cannot be read, truncated or damaged? ({one_line(error)})"
        ) from error


def _is_lfs_pointer(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return False


def _tensors_of_pickle(path: Path) -> dict[str, StoredTensor]:
    state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(state, Mapping) or not all(torch.is_tensor(t) for t in state.values()):
        raise BadModelFile(f"{path.name}: does not hold tensors by name")
    spelled = {dtype: name for name, dtype in STORED_DTYPES.items()}
    return {
        name: StoredTensor(
            dtype=spelled.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
            shape=tuple(tensor.shape),
            file=path.name,
        )
        for name, tensor in state.items()
    }


def _bare(name: str) -> str:
    """Returns a tensor name without the prefix that transformers treats as optional."""
    return re.sub(r"^(model\.)+", "", name)


def _listed(tensors: Mapping[str, StoredTensor]) -> str:
    return listed([f"{n} {_shape(t.shape)} {t.dtype}" for n, t in sorted(tensors.items())])


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
