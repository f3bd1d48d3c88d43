"""Small tokenizers of the kinds that models come with, of which any token may be drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import CONTEXT, MODELS

PADDED_VOCABULARY = 384
"""V of ``write_model``, more than any of these tokenizers has."""

WORDS = ("the", "capital", "of", "is", "Paris", "naïve", "漢字", "\ufffd")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gpt2() -> PreTrainedTokenizerFast:
    backend = _byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def llama3() -> PreTrainedTokenizerFast:
    backend = _byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )


def qwen() -> PreTrainedTokenizerFast:
    """Has added tokens that are not special."""
    backend = _byte_level()
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def llama2() -> PreTrainedTokenizerFast:
    """Its decoder strips the text's first blank."""
    backend = _sentencepiece(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _with_specials(backend)


def mistral() -> PreTrainedTokenizerFast:
    """As Llama 2, with a pre-tokenizer for the blank."""
    backend = _sentencepiece(decoders.Strip(" ", 1, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _with_specials(backend)


def gemma() -> PreTrainedTokenizerFast:
    """Strips nothing, puts no blank in front, and has tokens for runs of newlines."""
    backend = _sentencepiece()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    return _with_specials(backend)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": gpt2,
    "llama3": llama3,
    "qwen": qwen,
    "llama2": llama2,
    "mistral": mistral,
    "gemma": gemma,
}


def write_model(kind: str, directory: Path, *, context: int = CONTEXT) -> Path:
    """Writes a tiny random llama with this tokenizer, whose vocabulary is padded."""
    tokenizer = KINDS[kind]()
    tokenizer.save_pretrained(directory)
    _, values = MODELS["llama"]
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    sizes = {"vocab_size": PADDED_VOCABULARY, "max_position_embeddings": context}
    config = CONFIG_MAPPING["llama"](**{**values, **special, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def _byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [*(f" {word}" for word in WORDS), *WORDS, "\n\n", "  "]
    words = [level.pre_tokenize_str(text)[0][0] for text in texts]
    backend = Tokenizer(_bpe(letters, words))
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(*more: Any) -> Tokenizer:
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzP.ï漢字\ufffd"]
    words = [*(f"▁{word}" for word in WORDS), *WORDS, "▁▁"]
    backend = Tokenizer(
        _bpe(
            ["<unk>", "<s>", "</s>", *BYTES, *letters], words, unk_token="<unk>", byte_fallback=True
        )
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    )
    return backend


def _bpe(letters: list[str], words: list[str], **settings: Any) -> BPE:
    """Every word's tokens are merged from its left."""
    merges = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}
    tokens = dict.fromkeys([*letters, *(left + right for left, right in merges)])
    return BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), **settings)


def _with_specials(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
