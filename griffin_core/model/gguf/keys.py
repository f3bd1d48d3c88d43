"""The keys of GGUF files: which are supported, and how they are treated.

A key of the architecture or of the tokenizer that is in no table here is refused by name, since it
may change the computation or the text. llama.cpp reads only keys of the architecture and keys that
begin with ``general.``, ``tokenizer.`` and ``split.``; all others are ignored, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from griffin_core.errors import UnknownFamily, listed
from griffin_core.model.gguf.file import GgufFile, one_line
from griffin_core.model.gguf.kinds import KINDS, Kind, is_of

ARCHITECTURES = {
    "llama": "llama, or mistral where there is a sliding window",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""``general.architecture`` -> families of transformers."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """A supported key.

    Args:
        meaning: what it sets, for the reference page.
        architectures: the architectures that may have it.
        only: the allowed values, if other values are not supported.
        why_only: what other values would mean.
    """

    kind: Kind
    meaning: str
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    only: tuple[object, ...] | None = None
    why_only: str = ""


ARCHITECTURE_KEYS: dict[str, Key] = {
    "context_length": Key(kind="count", meaning="max_position_embeddings"),
    "embedding_length": Key(kind="count", meaning="hidden_size"),
    "block_count": Key(kind="count", meaning="num_hidden_layers"),
    "feed_forward_length": Key(kind="counts", meaning="intermediate_size"),
    "vocab_size": Key(kind="count", meaning="vocab_size; the embedding has as many rows"),
    "attention.head_count": Key(kind="counts", meaning="num_attention_heads"),
    "attention.head_count_kv": Key(
        kind="counts", meaning="num_key_value_heads; as many as heads without it"
    ),
    "attention.key_length": Key(kind="count", meaning="head_dim; width / heads without it"),
    "attention.value_length": Key(kind="count", meaning="the same as attention.key_length"),
    "attention.key_length_swa": Key(kind="count", meaning="the same as attention.key_length"),
    "attention.value_length_swa": Key(kind="count", meaning="the same as attention.key_length"),
    "attention.layer_norm_rms_epsilon": Key(kind="number", meaning="rms_norm_eps"),
    "attention.causal": Key(
        kind="flag", meaning="causal attention", only=(True,), why_only="an encoder"
    ),
    "attention.sliding_window": Key(
        kind="integer",
        meaning="sliding_window of llama, gemma2 and gemma3; 0 for none",
    ),
    "attention.sliding_window_pattern": Key(
        kind="any",
        meaning="which layers slide: every one but each n-th, or a flag for each layer",
        architectures=("gemma2", "gemma3"),
    ),
    "attn_logit_softcapping": Key(
        kind="number", meaning="attn_logit_softcapping", architectures=("gemma2",)
    ),
    "final_logit_softcapping": Key(
        kind="number",
        meaning="final_logit_softcapping",
        architectures=("gemma2", "gemma3"),
    ),
    "rope.dimension_count": Key(kind="count", meaning="the same as attention.key_length"),
    "rope.dimension_count_swa": Key(kind="count", meaning="the same as attention.key_length"),
    "rope.freq_base": Key(kind="number", meaning="rope_theta; 10000 without it"),
    "rope.freq_base_swa": Key(
        kind="number",
        meaning="rope_theta of layers that slide; 10000 without it",
        architectures=("gemma3",),
    ),
    "rope.scaling.type": Key(
        kind="text", meaning="rope_type", only=("none", "linear", "yarn"), why_only="longrope"
    ),
    "rope.scaling.factor": Key(kind="number", meaning="factor of linear and yarn; 0 for none"),
    "rope.scale_linear": Key(kind="number", meaning="the older name of rope.scaling.factor"),
    "rope.scaling.original_context_length": Key(
        kind="count", meaning="original_max_position_embeddings of yarn"
    ),
    "rope.scaling.attn_factor": Key(
        kind="number", meaning="factor on the attention_factor of yarn"
    ),
    "rope.scaling.yarn_attn_factor": Key(kind="number", meaning="attention_factor of yarn"),
    "rope.scaling.yarn_log_multiplier": Key(kind="number", meaning="mscale_all_dim of yarn"),
    "rope.scaling.yarn_beta_fast": Key(kind="number", meaning="beta_fast of yarn"),
    "rope.scaling.yarn_beta_slow": Key(kind="number", meaning="beta_slow of yarn"),
    "rope.scaling.yarn_ext_factor": Key(
        kind="number", meaning="share of yarn", only=(1.0,), why_only="yarn in part"
    ),
    "rope.scaling.finetuned": Key(kind="flag", meaning="nothing: how the model was trained"),
    "expert_count": Key(
        kind="integer", meaning="experts", only=(0,), why_only="a mixture of experts"
    ),
    "expert_used_count": Key(
        kind="integer", meaning="experts of a token", only=(0,), why_only="a mixture of experts"
    ),
    "nextn_predict_layers": Key(
        kind="integer",
        meaning="layers that predict further tokens",
        only=(0,),
        why_only="more layers than the decoder runs",
    ),
    "pooling_type": Key(
        kind="integer", meaning="pooling", only=(0,), why_only="a model of embeddings"
    ),
    "tensor_data_layout": Key(
        kind="text",
        meaning="the order of rows of queries and keys",
        architectures=("llama",),
        only=("Meta AI original pth",),
        why_only="another order",
    ),
}
"""The keys of the architecture, without its name and the dot before them."""

TOKENIZER_KEYS: dict[str, Key] = {
    "ggml.model": Key(
        kind="text",
        meaning="sentencepiece with byte fallback (llama), or byte-level BPE (gpt2)",
        only=("llama", "gpt2"),
        why_only="another kind of tokenizer",
    ),
    "ggml.pre": Key(
        kind="text", meaning="how byte-level BPE splits text into words; of sentencepiece nothing"
    ),
    "ggml.tokens": Key(kind="texts", meaning="the vocabulary"),
    "ggml.scores": Key(kind="numbers", meaning="the order of merges of sentencepiece"),
    "ggml.token_type": Key(kind="numbers", meaning="which tokens are special or never split"),
    "ggml.merges": Key(kind="texts", meaning="merges of BPE"),
    "ggml.bos_token_id": Key(kind="integer", meaning="bos_token; 1 without it in sentencepiece"),
    "ggml.eos_token_id": Key(
        kind="integer",
        meaning="eos_token, which ends a completion; 2 without it in sentencepiece",
    ),
    "ggml.eot_token_id": Key(kind="integer", meaning="ends a completion too"),
    "ggml.eom_token_id": Key(kind="integer", meaning="ends a completion too"),
    "ggml.fim_pad_token_id": Key(kind="integer", meaning="ends a completion too"),
    "ggml.fim_rep_token_id": Key(kind="integer", meaning="ends a completion too"),
    "ggml.fim_sep_token_id": Key(kind="integer", meaning="ends a completion too"),
    "ggml.unknown_token_id": Key(kind="integer", meaning="unk_token"),
    "ggml.padding_token_id": Key(kind="integer", meaning="pad_token"),
    "ggml.add_bos_token": Key(kind="flag", meaning="whether prompts begin with bos_token"),
    "ggml.add_eos_token": Key(kind="flag", meaning="whether prompts end with eos_token"),
    "ggml.add_space_prefix": Key(kind="flag", meaning="whether a blank is put before a text"),
    "ggml.add_sep_token": Key(
        kind="flag", meaning="separators", only=(False,), why_only="separators in prompts"
    ),
    "ggml.remove_extra_whitespaces": Key(
        kind="flag", meaning="blanks are kept", only=(False,), why_only="blanks are dropped"
    ),
    "chat_template": Key(kind="text", meaning="the chat template"),
    "chat_templates": Key(kind="texts", meaning="names of further chat templates"),
}
"""The keys that begin with ``tokenizer.``, without this prefix."""

CHAT_TEMPLATE_OF = "chat_template."
"""The prefix of keys of named chat templates, after ``tokenizer.``."""

SENTENCEPIECE_IDS = {"ggml.bos_token_id": 1, "ggml.eos_token_id": 2}
"""The defaults of llama.cpp for a sentencepiece tokenizer. Gemma has other tokens at these ids."""

IGNORED: dict[str, str] = {
    "tokenizer.ggml.seperator_token_id": "only used with add_sep_token",
    "tokenizer.ggml.mask_token_id": "for encoders",
    "tokenizer.ggml.cls_token_id": "for encoders",
    "tokenizer.ggml.fim_*": "names of other tokens for filling in; a prompt may hold them",
    "tokenizer.ggml.prefix_token_id": "the same by an older name",
    "tokenizer.ggml.suffix_token_id": "the same by an older name",
    "tokenizer.ggml.middle_token_id": "the same by an older name",
    "tokenizer.huggingface.json": "the same tokenizer once more; llama.cpp does not read it",
    "general.*": "describes the origin of the model",
    "split.*": "says which part of a split file this is; checked when it is read",
    "quantize.*": "says how the weights were quantized",
    "GGUF.*": "the header, which the reader checks",
}
"""Keys that change neither the computation nor the text -> why."""


def check_keys(file: GgufFile) -> None:
    """Refuses unsupported keys and values by name.

    Raises:
        UnknownFamily: the architecture is not supported.
        BadModelFile: a key is not supported, or a value is not allowed.
    """
    architecture = _architecture(file)
    unknown = []
    for name, value in file.keys.items():
        family, _, rest = name.partition(".")
        if family == architecture:
            key = ARCHITECTURE_KEYS.get(rest)
        elif family == "tokenizer":
            key = TOKENIZER_KEYS.get(rest)
            if key is None and rest.startswith(CHAT_TEMPLATE_OF):
                key = TOKENIZER_KEYS["chat_template"]
        else:
            continue
        if key is not None and architecture in key.architectures:
            _check_value(file, name, value, key)
        elif ignored_because(name) is None:
            unknown.append(f"{one_line(name, 80)} ({one_line(repr(value), 40)})")
    if unknown:
        raise file.bad(
            f"keys that are not understood for {architecture}, and may change the computation or "
            f"the text: {listed(unknown)}"
        )


def ignored_because(name: str) -> str | None:
    """Returns why a key is ignored; None if it is not ignored."""
    for pattern, reason in IGNORED.items():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return reason
    return None


def architecture_keys(file: GgufFile) -> Mapping[str, Any]:
    """Returns the checked keys of the architecture, without its name; a list of equal values
    becomes one value."""
    prefix = f"{file.keys['general.architecture']}."
    found = {
        name.removeprefix(prefix): value
        for name, value in file.keys.items()
        if name.startswith(prefix)
    }
    return {
        name: value[0] if ARCHITECTURE_KEYS[name].kind == "counts" and _is_list(value) else value
        for name, value in found.items()
    }


def tokenizer_keys(file: GgufFile) -> Mapping[str, Any]:
    """Returns the checked keys of the tokenizer, without ``tokenizer.``."""
    prefix = "tokenizer."
    found = {
        name.removeprefix(prefix): value
        for name, value in file.keys.items()
        if name.startswith(prefix) and not names_no_token(file, name)
    }
    if found.get("ggml.model") != "llama" or _architecture(file).startswith("gemma"):
        return found
    tokens = found.get("ggml.tokens", ())
    return {name: i for name, i in SENTENCEPIECE_IDS.items() if i < len(tokens)} | found


def names_no_token(file: GgufFile, name: str) -> bool:
    """Returns whether a key gives a special token an id beyond the vocabulary, such as 4294967295.
    Such a key counts as missing, as in llama.cpp."""
    value = file.keys[name]
    tokens = file.keys.get("tokenizer.ggml.tokens", ())
    is_id = name.startswith("tokenizer.") and name.endswith("_token_id")
    return is_id and isinstance(value, int) and value >= len(tokens)


def _architecture(file: GgufFile) -> str:
    kind = file.keys.get("general.type", "model")
    if kind != "model":
        raise file.bad(
            f"general.type: got {kind!r}; allowed: 'model'. An adapter, a projector or an "
            "importance matrix is no model by itself"
        )
    architecture = file.keys.get("general.architecture")
    if not isinstance(architecture, str):
        raise file.bad("it has no general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnknownFamily(
            f"model: {file.path.name!r}: general.architecture: got {one_line(architecture, 80)!r}; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    return architecture


def _check_value(file: GgufFile, name: str, value: object, key: Key) -> None:
    if not is_of(key.kind, value):
        raise file.bad(f"{name}: got {_shown(value)}; allowed: {KINDS[key.kind]}")
    if key.only is not None and value not in key.only:
        allowed = ", ".join(map(repr, key.only))
        experts = [tensor for tensor in file.tensors.values() if "_exps." in tensor.name]
        tensors = f" ({listed(experts)})" if experts else ""
        raise file.bad(
            f"{name}: got {_shown(value)}; allowed: {allowed}. Other values mean {key.why_only}"
            f"{tensors}"
        )


def _shown(value: object) -> str:
    return one_line(repr(value), 80)


def _is_list(value: object) -> bool:
    return isinstance(value, list)
