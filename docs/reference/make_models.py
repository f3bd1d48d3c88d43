"""Writes docs/reference/models.md from the tables that loading itself uses: `make reference`."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from page_parts import table
from transformers import CONFIG_MAPPING

from griffin_core.model.checkpoint import LEFT_OVER, STORED_DTYPES
from griffin_core.model.families.activations import ACTIVATIONS
from griffin_core.model.families.config_fields import NEUTRAL, WITHOUT_EFFECT
from griffin_core.model.families.config_file import QUANTIZATION_FIELDS
from griffin_core.model.families.registry import FAMILIES, examine_config
from griffin_core.model.families.rotary import ROPE_TYPES
from griffin_core.model.files import REFUSED_FILES
from griffin_core.model.gguf import SAMPLING
from griffin_core.model.gguf.file import QUANTIZATION_TYPES
from griffin_core.model.gguf.keys import ARCHITECTURE_KEYS, ARCHITECTURES, IGNORED, TOKENIZER_KEYS
from griffin_core.model.gguf.keys import Key as GgufKey
from griffin_core.model.gguf.tensors import LEFT_OVER as GGUF_LEFT_OVER
from griffin_core.model.gguf.words import WORDS

PAGE = Path(__file__).with_name("models.md")

NOT_MENDED = (
    "two tensors of one shape that are exchanged, and values that another training would have "
    "given: no file says what its numbers should be",
    "in a GGUF: another `query_pre_attn_scalar` or activation than the family's, and the sliding "
    "window of Mistral 7B v0.1, which llama.cpp's converter does not write",
)


def page() -> str:
    """The whole page."""
    parts = [
        "# Models and files",
        "This page is made from the tables that loading uses (`make reference`), and a test keeps "
        "it so. All of the model comes from its files, or there is no model: every tensor that the "
        "model takes is in the file, every tensor of the file is used, and every field or key that "
        "changes the computation or the text is understood, or the load is refused in one line "
        "that names it. `griffin check MODEL` says all of this of one model, and compares its "
        "logits with those of transformers.",
        *_families(),
        *_forms(),
        *_weights(),
        *_fields(),
        *_gguf(),
        "## What cannot be detected",
        "\n".join(f"- {case}." for case in NOT_MENDED),
    ]
    return "\n\n".join(parts) + "\n"


def _families() -> list[str]:
    known = {
        family: name
        for name, said in ARCHITECTURES.items()
        for family in FAMILIES
        if family in said.replace(",", "").split()
    }
    rows = [
        (f"`{family}`", f"`{known[family]}`" if family in known else "none") for family in FAMILIES
    ]
    return [
        "## Families",
        table(("`model_type`", "architecture in GGUF"), rows),
        f"Activations: {_names(ACTIVATIONS)}. Rotary positions, with the entries of "
        "`rope_parameters` that each reads beside `rope_theta`:",
        table(
            ("`rope_type`", "reads"),
            [(f"`{kind}`", _names(sorted(read)) or "nothing") for kind, read in ROPE_TYPES.items()],
        ),
        "`dynamic` and `longrope` change with the length of the text, so keys that are cached "
        "would come to be wrong; they load where they do not change up to "
        "`max_position_embeddings`.",
        _shown(
            "tests/unit/core/test_decoder_parity.py::test_prefill_and_32_steps_give_transformers_logits",
            "tests/unit/core/test_config_fields.py::"
            "test_a_field_is_followed_as_transformers_does_or_refused_by_its_name",
        ),
    ]


def _forms() -> list[str]:
    rows = [
        (
            "a directory with `config.json` and `model.safetensors`, single or in shards",
            "tests/unit/core/test_checkpoint.py::test_every_form_of_a_checkpoint_loads",
        ),
        (
            "the same with `pytorch_model.bin`, with `--allow-pickle`",
            "tests/unit/core/test_checkpoint.py::test_every_form_of_a_checkpoint_loads",
        ),
        (
            "a hub id",
            "tests/unit/core/test_checkpoint.py::test_a_model_of_the_hub_is_read_from_its_cache",
        ),
        (
            "a `.gguf` file",
            "tests/unit/core/test_gguf.py::test_a_gguf_of_each_family_gives_the_logits_of_its_model",
        ),
        (
            "any part of a split `.gguf`, with the others beside it",
            "tests/unit/core/test_gguf.py::test_a_split_file_is_loaded_whole_from_any_part",
        ),
        (
            "`tokenizer.json`, or `tokenizer.model` alone",
            "tests/unit/core/test_tokenizer.py::test_a_sentencepiece_model_alone_is_read",
        ),
    ]
    return ["## Forms of files", table(("form", "shown by"), [(a, f"`{b}`") for a, b in rows])]


def _weights() -> list[str]:
    refused = defaultdict(list)
    for name, why in REFUSED_FILES.items():
        refused[why].append(name)
    return [
        "## Weights",
        f"Stored as {_names(STORED_DTYPES)}. Other types are refused by their names, as are "
        f"weights that {_names(QUANTIZATION_FIELDS)} of `config.json` calls quantized, and tensors "
        "of scales. Quantized weights load from GGUF, where they are dequantized.",
        "Refused if they lie beside the weights:",
        table(("file", "why"), [(_names(names), why) for why, names in refused.items()]),
        "Tensors that may be left over (regular expressions):",
        table(("tensor", "why"), [(f"`{name}`", why) for name, why in LEFT_OVER.items()]),
        _shown(
            "tests/unit/core/test_checkpoint.py::"
            "test_weights_stored_in_a_type_of_quantization_are_refused_by_it",
            "tests/unit/core/test_checkpoint.py::test_what_may_be_left_over_is_left_out",
            "tests/unit/core/test_mutations.py::"
            "test_a_mutated_model_is_what_transformers_makes_of_it_or_is_refused",
        ),
    ]


def _fields() -> list[str]:
    read = []
    for family in FAMILIES:
        _, uses = examine_config(CONFIG_MAPPING[family]())
        read.append((f"`{family}`", _names(use.name for use in uses if use.use == "read")))
    without = defaultdict(list)
    for name, why in WITHOUT_EFFECT.items():
        without[why].append(name)
    neutral = defaultdict(list)
    for name, values in NEUTRAL.items():
        neutral[", ".join(f"`{value!r}`" for value in values)].append(name)
    return [
        "## Fields of config.json",
        "Read, and followed or refused by their values:",
        table(("family", "fields"), read),
        "Without effect on logits, whatever their values:",
        table(("fields", "why"), [(_names(names), why) for why, names in without.items()]),
        "Of mechanisms that a family does not have, so that only these values load:",
        table(("values", "fields"), [(v, _names(names)) for v, names in neutral.items()]),
        "All other fields of the config class of the family must have its default. Names that the "
        "class does not know are left out, as transformers leaves them out.",
        _shown(
            "tests/unit/core/test_config_fields.py::"
            "test_a_field_is_followed_as_transformers_does_or_refused_by_its_name",
            "tests/unit/core/test_config_fields.py::"
            "test_what_becomes_of_every_field_of_a_family_is_known",
        ),
    ]


def _gguf() -> list[str]:
    words = defaultdict(list)
    for name, how in WORDS.items():
        words[how.splits].append(name)
    return [
        "## GGUF",
        f"Types of tensors: {_names(QUANTIZATION_TYPES)}.",
        "Keys of the architecture (`llama.` and the like before them):",
        _keys(ARCHITECTURE_KEYS),
        "Keys of the tokenizer (`tokenizer.` before them):",
        _keys(TOKENIZER_KEYS),
        f"Sampling of the authors, for `--sampling-defaults model`: {_names(SAMPLING)}.",
        "Keys without effect:",
        table(("key", "why"), [(f"`{name}`", why) for name, why in IGNORED.items()]),
        "All other keys of the architecture and of the tokenizer are refused. Tensors that may be "
        "left over:",
        table(("tensor", "why"), [(f"`{name}`", why) for name, why in GGUF_LEFT_OVER.items()]),
        "Known pre-tokenizers (`tokenizer.ggml.pre`), a line for each way to split; others are "
        "refused:",
        "\n".join(f"- {_names(names)}" for names in words.values()),
        _shown(
            "tests/unit/core/test_gguf.py::test_a_field_of_the_config_that_gguf_has_reaches_the_logits",
            "tests/unit/core/test_gguf.py::test_each_form_of_rope_scaling_that_llama_cpp_knows",
            "tests/unit/core/test_gguf.py::test_quantized_tensors_are_dequantized",
            "tests/unit/core/test_gguf.py::test_a_key_that_is_not_understood_is_refused_by_name",
            "tests/unit/core/test_gguf.py::"
            "test_byte_level_bpe_gives_the_tokens_of_the_models_own_tokenizer",
            "tests/unit/core/test_gguf_mutations.py::"
            "test_a_mutated_file_is_what_transformers_has_or_is_refused",
        ),
    ]


def _keys(keys: Mapping[str, GgufKey]) -> str:
    rows = []
    for name, key in keys.items():
        allowed = "" if key.only is None else f"{', '.join(f'`{v!r}`' for v in key.only)} only"
        if key.architectures != tuple(ARCHITECTURES):
            allowed = f"{allowed}; of {_names(key.architectures)}".removeprefix("; ")
        rows.append((f"`{name}`", key.meaning, allowed))
    return table(("key", "meaning", "allowed"), rows)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shown(*tests: str) -> str:
    return f"Shown by {_names(tests)}."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}\n")
