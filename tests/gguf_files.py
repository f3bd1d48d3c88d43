"""GGUF files of tiny random models, laid out as llama.cpp's converter lays them out.

A file is put together as ``Contents``, which tests may change before they write it; the model of
transformers that it is made of is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from tokenizers import pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.model.load import Model

VOCABULARY = 320
CONTEXT = 256
HEAD_DIM = 16
LAYERS = 3
LETTERS = "▁abcdefghijklmnopqrstuvwxyz"
"""Tokens from id 259 on, after three special ones and 256 bytes."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
_WINDOWED = {"sliding_window": 7, "query_pre_attn_scalar": HEAD_DIM}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("llama", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", _WINDOWED),
    "gemma3_text": ("gemma3", _WINDOWED),
}
"""Family of transformers -> architecture in GGUF, and what its config has beside the shape."""

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_PLAIN_NORMS = {"post_attention_layernorm": "ffn_norm"}
_SANDWICH_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}


@dataclass
class Contents:
    """What is to be written.

    Args:
        keys: all but ``general.architecture``.
        tensors: name -> values, outermost dimension first.
        quantized: name -> type, for those that are not to be F32.
    """

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, np.ndarray[Any, Any]]
    quantized: dict[str, GGMLQuantizationType] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(str(path), self.architecture)
        for name, value in self.keys.items():
            if isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, list):
                writer.add_array(name, value)
            else:
                writer.add_key_value(name, value, _TYPES[type(value)])
        for name, values in self.tensors.items():
            kind = self.quantized.get(name)
            if kind is None:
                writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
            else:
                writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of transformers; ``changes`` are of its config."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**_SHAPE, **FAMILIES[family][1], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.inference_mode()
def difference(ours: Model, reference: PreTrainedModel) -> float:
    """The largest difference between our logits and those of transformers, over 24 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, reference.config.vocab_size, (24,), generator=generator)
    decoder = ours.decoder
    step = StepTokens(
        cache=decoder.new_cache(len(ids)),
        view=[layer.ff for layer in decoder.layers],
        token_ids=ids.tolist(),
    )
    logits = decode_tokens(decoder, [step])[0]
    expected = reference(ids[None]).logits[0]
    return (logits - expected).abs().max().item()


def contents_of(model: PreTrainedModel, *, bpe: str | None = None, **keys: Any) -> Contents:
    """What llama.cpp's converter writes of a model.

    Args:
        bpe: a pre-tokenizer, for a byte-level tokenizer instead of a sentencepiece one.
        keys: further ones of the architecture, dots written as two underscores; None drops one.
    """
    config = model.config
    architecture, _ = FAMILIES[config.model_type]
    own = {**_shape_keys(config), **_rope_keys(config)}
    own |= {name.replace("__", "."): value for name, value in keys.items()}
    named = {f"{architecture}.{name}": value for name, value in own.items() if value is not None}
    words = byte_level_keys(bpe) if bpe else sentencepiece_keys(architecture)
    tensors = {
        name: value.detach().float().numpy()
        for name, value in _tensors(model, architecture).items()
    }
    if config.rope_parameters.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _divisors(config)
    return Contents(architecture=architecture, keys={**named, **words}, tensors=tensors)


def sentencepiece_keys(architecture: str = "llama") -> dict[str, Any]:
    """A vocabulary of the Llama 2 kind: bytes, letters and some pieces, without merges."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    tokens += ["▁a", "ab", "bc", "▁ab", "abc", "▁abc", "he", "the", "▁the"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    tokens += ["<|user|>", "<think>"]
    types += [3, 4]
    tokens += [f"<extra{i}>" for i in range(VOCABULARY - len(tokens))]
    types += [1] * (VOCABULARY - len(types))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(VOCABULARY)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **({"tokenizer.ggml.add_space_prefix": False} if "gemma" in architecture else {}),
    }


def byte_level_keys(pre: str) -> dict[str, Any]:
    """A vocabulary of the GPT-2 kind: bytes, words made by merges, and one that merges miss."""
    merges = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "a b", "Ġ Ġ"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", "<|begin|>", "<|stop|>", *letters, *(m.replace(" ", "") for m in merges)]
    types = [3, 3, 3] + [1] * (len(tokens) - 3)
    tokens += ["hello", "<|user|>", "<｜ende▁des▁satzes｜>", "<think>"]
    types += [1, 3, 3, 4]
    tokens += [f"<extra{i}>" for i in range(VOCABULARY - len(tokens))]
    types += [1] * (VOCABULARY - len(types))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _shape_keys(config: Any) -> dict[str, Any]:
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if config.model_type != "qwen2":
        keys["attention.key_length"] = keys["attention.value_length"] = config.head_dim
    if config.model_type in ("llama", "mistral"):
        keys["rope.dimension_count"] = config.head_dim
        keys["vocab_size"] = config.vocab_size
    if config.model_type in ("mistral", "gemma2", "gemma3_text"):
        keys["attention.sliding_window"] = config.sliding_window
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            keys[name] = float(getattr(config, name))
    return keys


def _rope_keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    local = rope.get("sliding_attention", {}).get("rope_theta")
    rope = rope.get("full_attention", rope)
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if local is not None:
        keys["rope.freq_base_swa"] = float(local)
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    for name, key in (
        ("original_max_position_embeddings", "original_context_length"),
        ("attention_factor", "yarn_attn_factor"),
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
    ):
        if rope["rope_type"] == "yarn" and rope.get(name) is not None:
            keys[f"rope.scaling.{key}"] = rope[name]
    return keys


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, torch.Tensor]:
    config, tensors = model.config, {}
    norms = _SANDWICH_NORMS if architecture in ("gemma2", "gemma3") else _PLAIN_NORMS
    for name, given in model.state_dict().items():
        value = given
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        to = _TOP.get(name)
        if to is None:
            _, _, layer, rest = name.split(".", 3)
            base, suffix = rest.rsplit(".", 1)
            to = f"blk.{layer}.{({**_IN_LAYER, **norms})[base]}.{suffix}"
            if architecture == "llama" and base in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_" in base else config.num_key_value_heads
                halves = given.reshape(heads, 2, given.shape[0] // heads // 2, *given.shape[1:])
                value = halves.transpose(1, 2).reshape(given.shape)
        if architecture.startswith("gemma") and to.endswith("norm.weight"):
            value = value + 1
        tensors[to] = value
    return tensors


def _divisors(config: Any) -> np.ndarray[Any, Any]:
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=None)
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    divisors: np.ndarray[Any, Any] = (
        config.rope_parameters["rope_theta"] ** -exponents / scaled
    ).numpy()
    return divisors
