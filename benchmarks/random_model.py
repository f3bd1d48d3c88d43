"""Writes a model of a real shape with random weights, as a directory that every server can load.

Speed does not depend on the weights' values. The tokenizer is artificial too: it has as many tokens
as the vocabulary, each of a few letters, so that decoding text costs as much as with a real one.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from string import ascii_lowercase

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.cuda_shapes import SHAPES

DTYPE = torch.bfloat16
SHARD_BYTES = 4 << 30


def write_random_model(shape: str, directory: Path) -> Path:
    """Writes config, weights in bfloat16 and tokenizer; does nothing if they exist.

    Args:
        shape: a name in ``cuda_shapes.SHAPES``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done = directory / "complete"
    if done.exists():
        return directory
    family, values = SHAPES[shape]
    config = CONFIG_MAPPING[family](**values)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    config.architectures = [type(module).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    names = [
        name
        for name in module.state_dict()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    ]
    _write_weights({name: module.state_dict()[name].shape for name in names}, directory)
    word_tokenizer(config.vocab_size).save_pretrained(directory)
    done.touch()
    return directory


def _write_weights(shapes: dict[str, torch.Size], directory: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * DTYPE.itemsize
        if held and held + nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state = {
            name: torch.empty(shapes[name], dtype=DTYPE, device=device).normal_(std=0.02).cpu()
            for name in names
        }
        save_file(state, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names, file))
    total = sum(shape.numel() for shape in shapes.values()) * DTYPE.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of ``vocabulary`` tokens: the 256 bytes, then words of letters after a
    space. It encodes to bytes and decodes everything."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # which stands for it in byte-level BPE
    words = (
        space + "".join(letters)
        for length in itertools.count(3)
        for letters in itertools.product(ascii_lowercase, repeat=length)
    )
    special = ["<s>", "</s>"]
    tokens = [*bytes_, *itertools.islice(words, vocabulary - len(bytes_) - len(special))]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
