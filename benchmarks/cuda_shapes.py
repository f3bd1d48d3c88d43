"""Real shapes for benchmarks: the configurations of models that are too large to ship."""

from __future__ import annotations

from typing import Any

_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2-7B": ("llama", {**_LLAMA2, "hidden_size": 4096, "intermediate_size": 11008,
                             "num_hidden_layers": 32, "num_attention_heads": 32}),
    "Llama-2-13B": ("llama", {**_LLAMA2, "hidden_size": 5120, "intermediate_size": 13824,
                              "num_hidden_layers": 40, "num_attention_heads": 40}),
    "Gemma-7B": ("gemma", {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576,
                           "num_hidden_layers": 28, "num_attention_heads": 16,
                           "num_key_value_heads": 16, "head_dim": 256,
                           "max_position_embeddings": 8192}),
    "Llama-3-8B": ("llama", {"vocab_size": 128256, "hidden_size": 4096,
                             "intermediate_size": 14336, "num_hidden_layers": 32,
                             "num_attention_heads": 32, "num_key_value_heads": 8,
                             "max_position_embeddings": 8192}),
    "Mistral-7B": ("mistral", {"vocab_size": 32000, "hidden_size": 4096,
                               "intermediate_size": 14336, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "num_key_value_heads": 8,
                               "sliding_window": 4096, "max_position_embeddings": 32768}),
    "OPT-6.7B": ("opt", {"vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384,
                         "word_embed_proj_dim": 4096, "num_hidden_layers": 32,
                         "num_attention_heads": 32, "max_position_embeddings": 4096}),
}  # fmt: skip
"""Name -> (family, fields of its config), as in transformers."""
