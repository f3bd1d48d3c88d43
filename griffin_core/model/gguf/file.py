"""Reads GGUF files: their keys, tensors and parts.

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
"""The tensor types that can be read, by their names in GGUF; all others are refused."""

_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_CHECKPOINTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of a file.

    Args:
        shape: outermost dimension first, as in torch.
        kind: its type in GGUF, such as ``"Q4_K"``.
        stored: its bytes as stored in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    stored: np.ndarray[Any, Any]

    def __str__(self) -> str:
        return f"{self.name} ({'×'.join(map(str, self.shape))}, {self.kind})"

    def values(self) -> torch.Tensor:
        """Returns the tensor dequantized to float32, of ``shape``."""
        numbers = dequantize(self.stored, GGMLQuantizationType[self.kind])
        return torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A whole GGUF file, with all of its parts if it is split.

    Args:
        path: the path that the caller gave.
        keys: the keys of the first part, as Python values; lists for arrays.
        tensors: the tensors of all parts, by name.
    """

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def bad(self, what: str) -> BadModelFile:
        """Returns an error about this file, with a message of one line."""
        return BadModelFile(f"model: {self.path.name!r}: {one_line(what)}")


def one_line(text: object, longest: int = 1500) -> str:
    """Returns text from a file or library without line ends, cut to ``longest`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def part_paths(path: Path) -> tuple[Path, ...]:
    """Returns all parts of a split file, by the naming scheme of llama.cpp; for other files, the
    path itself.

    Raises:
        BadModelFile: parts are missing; the message names them.
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
            f"model: {path.name!r} is one of {count} parts, and these are not next to it: "
            f"{listed(missing)}"
        )
    return parts


def read_gguf(path: Path) -> GgufFile:
    """Reads the keys and the list of tensors of a file and all its parts.

    Raises:
        BadModelFile: the file is not a GGUF file, has an unsupported version, is damaged, or lacks
            parts.
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
    """Refuses tensors that are not stored one after the other. llama.cpp refuses them too."""
    expected = int(reader.data_offset)
    for tensor in reader.tensors:
        if tensor.data_offset != expected:
            raise file.bad(
                f"tensor {tensor.name}: got byte {tensor.data_offset} as its start; allowed: "
                f"{expected}, the end of the tensor before it"
            )
        expected += -(-tensor.n_bytes // int(reader.alignment)) * int(reader.alignment)


class _Reader(GGUFReader):  # type: ignore[misc]
    """The reader of the package gguf, without slices of a ``numpy.memmap``, which take most of its
    time: 28 s instead of 6 s for the 262,144 tokens of Gemma 3."""

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
            raise EOFError(f"it has {len(self.data)} bytes, but byte {end} is needed")
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
        raise BadModelFile(f"model: {path.name!r} is not a GGUF file ({shown}){hint}")
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
    except Exception as error:  # the reader raises many kinds of errors for damaged files
        raise BadModelFile(
            f"model: cannot read {path.name!r}, truncated or damaged? "
            f"({type(error).__name__}: {one_line(error, 200)})"
        ) from error


def _keys(path: Path, reader: GGUFReader) -> dict[str, Any]:
    keys = {}
    for name, field in reader.fields.items():
        try:
            keys[name] = field.contents()
        except Exception as error:  # most often text that is not UTF-8
            raise BadModelFile(
                f"model: {path.name!r}: cannot read the key {one_line(name, 80)!r} "
                f"({type(error).__name__}: {one_line(error, 200)})"
            ) from error
    return keys
