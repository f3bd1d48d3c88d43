"""A GGUF file as it lies on disk: its keys, its tensors and its parts.

The format is documented at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.quants import _type_traits

from griffin_core.errors import BadModelFile, listed

VERSIONS = (2, 3)

QUANTIZATION_TYPES = ("F32", "F16", *sorted(kind.name for kind in _type_traits))
"""Types of tensors that can be read, by their names in GGUF; all others are refused."""

_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_CHECKPOINTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of a file.

    Args:
        shape: outermost dimension first, as torch has it.
        kind: its type in GGUF, ``"Q4_K"`` say.
        stored: its bytes as they are in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    stored: np.ndarray[Any, Any]

    def __str__(self) -> str:
        return f"{self.name} ({'×'.join(map(str, self.shape))}, {self.kind})"

    def values(self) -> torch.Tensor:
        """The tensor in float32, of ``shape``."""
        numbers = dequantize(self.stored, GGMLQuantizationType[self.kind])
        return torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A whole file, with all of its parts where it is split.

    Args:
        path: what was asked for.
        keys: keys of the first part, as Python values; lists for arrays.
        tensors: by name, those of all parts.
    """

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def bad(self, what: str) -> BadModelFile:
        """The error for something that is wrong with this file, in one line."""
        return BadModelFile(f"model: {self.path.name!r}: {one_line(what)}")


def one_line(text: object, longest: int = 1500) -> str:
    """Text of others without its line ends, cut to ``longest`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def part_paths(path: Path) -> tuple[Path, ...]:
    """All parts of a split file by the names that llama.cpp gives them; else the path alone.

    Raises:
        BadModelFile: parts are missing; names them.
    """
    name = _PART.fullmatch(path.name)
    if name is None:
        return (path,)
    count = int(name["count"])
    parts = tuple(
        path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    )
    missing = [part.name for part in parts if not part.is_file()]
    if missing or path not in parts:
        raise BadModelFile(
            f"model: {path.name!r} is one of {count} parts, and others are not beside it: "
            f"{listed(missing)}"
        )
    return parts


def read_gguf(path: Path) -> GgufFile:
    """Reads keys and the list of tensors of a file and of all of its parts.

    Raises:
        BadModelFile: it is no GGUF file, of an unknown version, damaged, or lacks parts.
    """
    paths = part_paths(path)
    readers = [_reader(part) for part in paths]
    keys = [_keys(part, reader) for part, reader in zip(paths, readers, strict=True)]
    tensors: dict[str, GgufTensor] = {}
    whole = GgufFile(path=path, keys=keys[0], tensors=tensors)
    for number, (part, found) in enumerate(zip(paths, keys, strict=True)):
        said = found.get("split.count", 1) or 1, found.get("split.no", 0)
        if said != (len(paths), number):
            raise whole.bad(
                f"part {number + 1} of {len(paths)}, by its name {part.name!r}, says "
                f"split.count {said[0]}, split.no {said[1]}; allowed: {len(paths)}, {number}. A "
                "split file is found by the names of its parts, NAME-00001-of-0000N.gguf"
            )
    for reader in readers:
        _check_layout(whole, reader)
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise whole.bad(f"tensor {tensor.name} is in two parts")
            tensors[tensor.name] = GgufTensor(
                name=tensor.name,
                shape=tuple(reversed(tensor.shape.tolist())),
                kind=tensor.tensor_type.name,
                stored=tensor.data,
            )
    expected = whole.keys.get("split.tensors.count", len(tensors))
    if len(paths) > 1 and expected != len(tensors):
        raise whole.bad(f"split.tensors.count: got {expected}; its parts have {len(tensors)}")
    return whole


def _check_layout(file: GgufFile, reader: GGUFReader) -> None:
    """Refuses tensors that are not stored one after the other, as llama.cpp does."""
    expected = int(reader.data_offset)
    for tensor in reader.tensors:
        if tensor.data_offset != expected:
            raise file.bad(
                f"tensor {tensor.name}: got byte {tensor.data_offset} as its start; allowed: "
                f"{expected}, the end of the tensor before it"
            )
        expected += -(-tensor.n_bytes // int(reader.alignment)) * int(reader.alignment)


class _Reader(GGUFReader):  # type: ignore[misc]
    """The reader of gguf, whose slices of a ``numpy.memmap`` take most of its time: 28 s instead of
    6 s for the 262,144 tokens of Gemma 3."""

    @property
    def data(self) -> np.ndarray[Any, Any]:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray[Any, Any]) -> None:
        self._data = mapped.view(np.ndarray)

    def _get(
        self, offset: int, dtype: Any, count: Any = 1, *order: Any, **named: Any
    ) -> np.ndarray[Any, Any]:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise EOFError(f"it has {len(self.data)} bytes, and byte {end} is asked for")
        values: np.ndarray[Any, Any] = super()._get(offset, dtype, count, *order, **named)
        return values


def _reader(path: Path) -> GGUFReader:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise BadModelFile(f"model: cannot read {path.name!r} ({error.strerror})") from error
    if start[:4] != _MAGIC:
        shown = f"it starts with {start[:4]!r}" if start else "it is empty"
        hint = ""
        if path.suffix in _CHECKPOINTS:
            hint = f"; name the directory that holds {path.name!r} and its config.json instead"
        raise BadModelFile(f"model: {path.name!r} is no GGUF file ({shown}){hint}")
    version = int.from_bytes(start[4:8], "little")
    if len(start) == 8 and version not in VERSIONS:
        swapped = int.from_bytes(start[4:8], "big")
        shown = f"version {version}"
        if swapped <= max(VERSIONS):
            shown = f"version {swapped} in big-endian byte order"
        raise BadModelFile(
            f"model: {path.name!r} is GGUF {shown}; allowed: versions 2 and 3, little-endian"
        )
    try:
        return _Reader(path)
    except Exception as error:  # the reader raises anything from IndexError to KeyError
        raise BadModelFile(
            f"model: cannot read {path.name!r}, truncated or damaged? "
            f"({type(error).__name__}: {one_line(error, 200)})"
        ) from error


def _keys(path: Path, reader: GGUFReader) -> dict[str, Any]:
    keys = {}
    for name, field in reader.fields.items():
        try:
            keys[name] = field.contents()
        except Exception as error:  # text that is no UTF-8 above all
            raise BadModelFile(
                f"model: {path.name!r}: cannot read the key {one_line(name, 80)!r} "
                f"({type(error).__name__}: {one_line(error, 200)})"
            ) from error
    return keys
