"""Tiny random models of every family, as directories that transformers and Griffin both load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260
CONTEXT = 256

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.3,
}
_LLAMA = {**_SHAPE, "intermediate_size": 88, "num_key_value_heads": 2, "head_dim": 16}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_OPT = {**_SHAPE, "ffn_dim": 88, "word_embed_proj_dim": 48, "init_std": 0.3}

# name -> (family, config). The first eight are the families; the rest, their variants.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 7}),
    "qwen2": ("qwen2", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "qwen3": ("qwen3", _LLAMA),
    "gemma": ("gemma", _LLAMA),
    "gemma2": (
        "gemma2",
        {**_LLAMA, "sliding_window": 7, "layer_types": _SLIDING, "query_pre_attn_scalar": 24},
    ),
    "gemma3_text": (
        "gemma3_text",
        {**_LLAMA, "sliding_window": 7, "layer_types": _SLIDING, "query_pre_attn_scalar": 24},
    ),
    "opt": ("opt", _OPT),
    "llama-long": ("llama", {**_LLAMA, "max_position_embeddings": 4096}),
    "llama-relu": ("llama", {**_LLAMA, "hidden_act": "relu", "tie_word_embeddings": True}),
    "llama-biased-attention": ("llama", {**_LLAMA, "attention_bias": True}),
    "llama3-rope": (
        "llama",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-linear-rope": (
        "llama",
        {
            **_LLAMA,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            **{k: v for k, v in _LLAMA.items() if k != "head_dim"},
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2-sliding": (
        "qwen2",
        {
            **{k: v for k, v in _LLAMA.items() if k != "head_dim"},
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": _SLIDING,
        },
    ),
    "opt-norm-after": (
        "opt",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
}
FAMILIES = tuple(name for name, (family, _) in MODELS.items() if name == family)

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
)


def make_tiny(name: str, directory: Path) -> Path:
    """Writes a random model with a byte-level tokenizer, without a chat template for "opt"."""
    family, values = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    config = CONFIG_MAPPING[family](**values)
    model = AutoModelForCausalLM.from_config(config).eval()
    roughen(model)
    model.save_pretrained(directory)
    byte_tokenizer(with_template=family != "opt").save_pretrained(directory)
    return directory


def roughen(model: torch.nn.Module) -> None:
    """Makes norms and biases random as well: ones and zeros hide mistakes."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def byte_tokenizer(*, with_template: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if with_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
