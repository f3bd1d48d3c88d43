"""Writes the default model as a GGUF file in bfloat16, for llama.cpp in comparisons."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from griffin_core.model.hub import packaged_default


def write_bf16(path: Path) -> None:
    """Writes the packaged model with its matrices in bfloat16 and everything else unchanged."""
    source = GGUFReader(packaged_default())
    architecture = source.get_field("general.architecture")
    assert architecture is not None
    writer = GGUFWriter(path, architecture.contents())
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field is architecture:
            continue
        kind = field.types[0]
        value = field.contents()
        if field.name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_BF16)
        of = field.types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, of)
    for tensor in source.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if len(shape) > 1:
            kind16 = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quantize(values, kind16), raw_dtype=kind16)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
