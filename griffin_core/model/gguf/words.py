"""The ways in which byte-level BPE splits a text into words, by ``tokenizer.ggml.pre``.

The regular expressions are those of the models' own tokenizer.json, which llama.cpp follows too. An
unknown name is refused, since another split would give other tokens for the same text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Words:
    """A pre-tokenizer.

    Args:
        splits: regular expressions that split a text, applied one after the other.
        whole_first: whether a word that is a token becomes that token without applying merges.
        begins: whether prompts begin with bos_token if the file does not say.
        composed: whether the text is first normalized to Unicode's form NFC.
    """

    splits: tuple[str, ...]
    whole_first: bool = False
    begins: bool = False
    composed: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

_GPT_2 = Words(
    splits=(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
)
_DIGITS = Words(splits=(r"\p{N}", *_GPT_2.splits))
_LLAMA_3 = Words(
    splits=(
        rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    )
)
_LLAMA_3_WHOLE = replace(_LLAMA_3, whole_first=True, begins=True)
_QWEN_2 = Words(
    splits=(rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",)
)
_TEKKEN = Words(
    splits=(
        rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
    ),
    whole_first=True,
    begins=True,
)
_GPT_4O = Words(
    splits=(
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
    )
)
_DEEPSEEK_CODER = Words(
    splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
)

WORDS: dict[str, Words] = {
    "llama-bpe": _LLAMA_3_WHOLE,
    "llama3": _LLAMA_3_WHOLE,
    "llama-v3": _LLAMA_3_WHOLE,
    "falcon3": _LLAMA_3_WHOLE,
    "pixtral": _LLAMA_3_WHOLE,
    "midm-2.0": _LLAMA_3_WHOLE,
    "smaug-bpe": _LLAMA_3,
    "dbrx": _LLAMA_3,
    "qwen2": replace(_QWEN_2, composed=True),
    "deepseek-r1-qwen": _QWEN_2,
    "megrez": _QWEN_2,
    "kormo": _QWEN_2,
    "f2llmv2": _QWEN_2,
    "stablelm2": _QWEN_2,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT_4O,
    "deepseek-coder": _DEEPSEEK_CODER,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "minerva-7b": _DIGITS,
    "gpt-2": _GPT_2,
    "phi-2": _GPT_2,
    "a.x-4.0": _GPT_2,
    "gigachat": _GPT_2,
    "mellum": _GPT_2,
    "mpt": _GPT_2,
    "olmo": _GPT_2,
    "trillion": _GPT_2,
}
"""``tokenizer.ggml.pre`` -> its pre-tokenizer."""
