"""The config.json files of popular checkpoints, with all the fields that they have on the hub, of
which only the sizes are smaller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.references import assert_equal_or_refused
from tests.tiny import byte_tokenizer, roughen

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}
_STORED = {"initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
_LLAMA: dict[str, Any] = {
    **_SIZES,
    **_STORED,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_MISTRAL: dict[str, Any] = {
    **_SIZES,
    **_STORED,
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "transformers_version": "4.34.0.dev0",
}
_QWEN_2: dict[str, Any] = {
    **_SIZES,
    **_STORED,
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
_QWEN_3: dict[str, Any] = {
    **{name: value for name, value in _QWEN_2.items() if name != "use_mrope"},
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
}
_GEMMA: dict[str, Any] = {
    **_SIZES,
    **_STORED,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": [1, 107],
    "head_dim": 16,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
}
_OPT: dict[str, Any] = {
    "_name_or_path": "opt-125m",
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 88,
    "hidden_size": 48,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 128,
    "model_type": "opt",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 260,
    "word_embed_proj_dim": 48,
}
_ROPE_8 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "Llama 1": {
        **{name: _LLAMA[name] for name in (*_SIZES, *_STORED, "hidden_act", "model_type")},
        "architectures": ["LLaMAForCausalLM"],
        "max_sequence_length": 2048,
        "num_key_value_heads": 4,
        "pad_token_id": -1,
        "rms_norm_eps": 1e-06,
    },
    "Llama 2": {**_LLAMA, "_name_or_path": "x", "max_position_embeddings": 4096},
    "Llama 3.1": {
        **_LLAMA,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rope_scaling": _ROPE_8,
        "rope_theta": 500000.0,
    },
    "Llama 3.2 of unsloth": {
        **_LLAMA,
        "head_dim": 16,
        "pad_token_id": 4,
        "rope_scaling": {**_ROPE_8, "factor": 32.0},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "unsloth_fixed": True,
    },
    "SmolLM2": {
        **_LLAMA,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Vicuna 16k": {
        **_LLAMA,
        "max_sequence_length": 16384,
        "pad_token_id": 0,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "Yarn Llama 2": {
        **_LLAMA,
        "max_position_embeddings": 4096,
        "rope_scaling": {
            "factor": 16.0,
            "finetuned": True,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    },
    "Mistral 7B v0.1": _MISTRAL,
    "Mistral Nemo": {
        **_MISTRAL,
        "attention_dropout": 0.0,
        "head_dim": 16,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Qwen2.5": _QWEN_2,
    "Qwen2.5 Coder with yarn": {
        **_QWEN_2,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
    },
    "Qwen2.5 1M": {
        **_QWEN_2,
        "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192},
        "max_position_embeddings": 1010000,
    },
    "Qwen3": _QWEN_3,
    "DeepSeek R1 0528 Qwen3": {
        **_QWEN_3,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "attn_factor": 0.8782488562869419,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "rope_type": "yarn",
        },
    },
    "Gemma": {
        **_GEMMA,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "rope_scaling": None,
    },
    "Gemma 2": {
        **_GEMMA,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 224,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    "Gemma 3 1B": {
        **_GEMMA,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "Gemma 3 270M": {
        **_GEMMA,
        "_sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": 512,
        "use_bidirectional_attention": False,
    },
    "OPT 125M": _OPT,
    "OPT 350M": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "Galactica": {
        **_OPT,
        "_remove_final_layer_norm": False,
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "learned_embeddings": True,
        "scale_embeddings": False,
    },
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_popular_checkpoint_loads_and_equals_transformers(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CHECKPOINTS[name]))
    config = AutoConfig.from_pretrained(tmp_path)
    config.initializer_range = config.init_std = 0.3
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    roughen(model)
    model.save_pretrained(tmp_path)
    byte_tokenizer(with_template=True).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CHECKPOINTS[name]))
    assert assert_equal_or_refused(tmp_path) is None
