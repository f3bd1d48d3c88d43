"""Makes a transformers tokenizer from the keys of a GGUF file.

The GGUF reader of transformers is not used: it ignores ``add_space_prefix``, does not take whole
words before merges where a vocabulary needs that, and splits words like GPT-2 for every
pre-tokenizer that it does not support.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from griffin_core.errors import BadModelFile, listed
from griffin_core.model.gguf.file import GgufFile, one_line
from griffin_core.model.gguf.keys import CHAT_TEMPLATE_OF, tokenizer_keys
from griffin_core.model.gguf.words import WORDS

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_BLANK = "▁"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_NAMED = {
    "bos_token": "ggml.bos_token_id",
    "eos_token": "ggml.eos_token_id",
    "unk_token": "ggml.unknown_token_id",
    "pad_token": "ggml.padding_token_id",
}
_ENDS = (
    "ggml.eos_token_id",
    "ggml.eot_token_id",
    "ggml.eom_token_id",
    "ggml.fim_pad_token_id",
    "ggml.fim_rep_token_id",
    "ggml.fim_sep_token_id",
)

END_TEXTS = frozenset(
    {
        "<|eot_id|>",  # Llama 3
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|im_end|>",  # ChatML: Qwen, Yi, SmolLM2, Hermes
        "<|endoftext|>",
        "<|end|>",  # Phi
        "<end_of_turn>",  # Gemma
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",  # DeepSeek
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "<end_of_utterance>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|fim_pad|>",  # for fill-in-the-middle: another file begins after it
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    }
)
"""The texts of tokens at which llama.cpp ends a completion, whether a key of the file names them or
not. Here such a token must also be a control or user-defined token, or the file must not have token
types; an ordinary word with that spelling does not end a completion."""

CONTROL_END_TEXTS = frozenset({"</s>"})
"""The same, but for control tokens only: Gemma uses </s> for text that is struck out."""


def tokenizer_of(file: GgufFile, vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a file whose keys are checked.

    Args:
        vocab_size: V, the number of rows of the embedding.

    Raises:
        BadModelFile: keys are missing, contradict one another, or name an unknown pre-tokenizer.
    """
    keys = tokenizer_keys(file)
    tokens = _tokens(file, keys, vocab_size)
    kind = _needed(file, keys, "ggml.model")
    try:
        backend = (_sentencepiece if kind == "llama" else _byte_level)(file, keys, tokens)
    except BadModelFile:
        raise
    except Exception as error:  # tokenizers raises a plain one, for example for unknown merges
        raise file.bad(f"its keys make no tokenizer ({error})") from error
    _add_tokens(keys, tokens, backend, end_tokens(file))
    _add_ends(file, keys, tokens, backend)
    named = {name: tokens[keys[key]] for name, key in _NAMED.items() if key in keys}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **named
    )
    if len(tokenizer) != len(tokens):
        raise file.bad(
            f"its {len(tokens)} tokens make a tokenizer of {len(tokenizer)}: some cannot be added"
        )
    if template := _chat_templates(keys):
        tokenizer.chat_template = template
    return tokenizer


def end_tokens(file: GgufFile) -> list[int]:
    """Returns the tokens that end a completion, the main one first: those that keys name, and those
    that llama.cpp recognizes by their text (``END_TEXTS``)."""
    keys = tokenizer_keys(file)
    named = [keys[name] for name in _ENDS if name in keys]
    kinds = keys.get("ggml.token_type")
    by_text = [
        index
        for index, token in enumerate(keys["ggml.tokens"])
        if _ends_by_text(token, kinds[index] if kinds else None)
    ]
    return list(dict.fromkeys(named + by_text))


def _ends_by_text(token: str, kind: int | None) -> bool:
    if token in CONTROL_END_TEXTS:
        return kind == _CONTROL
    return token in END_TEXTS and kind in (_CONTROL, _USER_DEFINED, None)


def _tokens(file: GgufFile, keys: Mapping[str, Any], vocab_size: int) -> list[str]:
    given: list[str] = _needed(file, keys, "ggml.tokens")
    if len(given) != vocab_size:
        raise file.bad(
            f"tokenizer.ggml.tokens: got {len(given)} tokens; allowed: {vocab_size}, the rows of "
            "token_embd.weight"
        )
    for name in ("ggml.scores", "ggml.token_type"):
        if len(keys.get(name, given)) != len(given):
            raise file.bad(
                f"tokenizer.{name}: got {len(keys[name])} values; allowed: one for each of "
                f"{len(given)} tokens"
            )
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(given)]
    twice = [repr(one_line(t, 40)) for t, times in Counter(tokens).items() if times > 1]
    if twice:
        raise file.bad(f"tokenizer.ggml.tokens: duplicates: {listed(twice)}")
    if not end_tokens(file):
        raise file.bad(
            "it lacks the key tokenizer.ggml.eos_token_id, and none of its tokens is known to end "
            "a text"
        )
    return tokens


def _sentencepiece(file: GgufFile, keys: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    gemma = file.keys["general.architecture"].startswith("gemma")
    if gemma:  # runs of spaces are stored as spaces, but the text to match has the space symbol
        tokens = [_BLANK * len(t) if not t.strip(" ") else t for t in tokens]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = keys.get("ggml.unknown_token_id")
    if unknown is None and not vocabulary.keys() >= set(_BYTES):
        raise file.bad(
            "tokenizer.ggml.unknown_token_id: it is missing, and so are some of the tokens <0x00> "
            "to <0xFF>: some texts would lose characters"
        )
    merges = _pairs(file, keys.get("ggml.merges", ()))
    if "ggml.merges" not in keys:
        # Gemma's scores do not follow the order of its merges; its ids do.
        ranks = [-index for index in range(len(tokens))] if gemma else keys.get("ggml.scores")
        if ranks is None:
            raise file.bad("it has neither tokenizer.ggml.scores nor tokenizer.ggml.merges")
        merges = generate_merges(vocabulary, dict(zip(tokens, ranks, strict=True)))
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # A space is added before a text and after each special token, even if there is one already.
    # llama.cpp and the tokenizer.json of Llama 2 do the same, but transformers' own class does not.
    prefix = keys.get("ggml.add_space_prefix", not gemma)
    blanks = normalizers.Replace(" ", _BLANK)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_BLANK), blanks]) if prefix else blanks
    )
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _byte_level(file: GgufFile, keys: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    words = WORDS.get(keys.get("ggml.pre", ""))
    if words is None:
        given = one_line(repr(keys.get("ggml.pre")), 80)
        raise file.bad(f"tokenizer.ggml.pre: got {given}; known: {', '.join(WORDS)}")
    if keys.get("ggml.add_space_prefix"):
        raise file.bad("tokenizer.ggml.add_space_prefix: got True; allowed with BPE: False")
    merges = _pairs(file, _needed(file, keys, "ggml.merges"))
    backend = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=words.whole_first,
        )
    )
    if words.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in words.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _pairs(file: GgufFile, merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise file.bad(
                f"tokenizer.ggml.merges[{index}]: got {one_line(repr(merge), 80)}; allowed: two "
                "tokens with a blank between them"
            )
        pairs.append((left, right))
    return pairs


def _add_tokens(
    keys: Mapping[str, Any], tokens: list[str], backend: Tokenizer, ends: list[int]
) -> None:
    kinds = keys.get("ggml.token_type", ())
    known = backend.get_vocab(with_added_tokens=False)
    named = [keys[name] for name in _NAMED.values() if name in keys]
    special = {tokens[index] for index in (*named, *ends)}
    added: dict[bool, list[AddedToken]] = {True: [], False: []}
    for index, token in enumerate(tokens):
        kind = kinds[index] if kinds else None
        is_special = token in special or kind in (_CONTROL, _UNKNOWN)
        if token in known and (is_special or kind == _USER_DEFINED):
            added[is_special].append(AddedToken(token, normalized=False, special=is_special))
    backend.add_special_tokens(added[True])
    backend.add_tokens(added[False])


def _add_ends(
    file: GgufFile, keys: Mapping[str, Any], tokens: list[str], backend: Tokenizer
) -> None:
    words = WORDS.get(keys.get("ggml.pre", ""))
    begins = keys["ggml.model"] == "llama" or (words is not None and words.begins)
    ends = {}
    for side, key, default in (
        ("bos", "ggml.add_bos_token", begins),
        ("eos", "ggml.add_eos_token", False),
    ):
        if keys.get(key, default):
            ends[side] = _needed(file, keys, f"ggml.{side}_token_id")
    if not ends:
        return
    order = [s for s in ("bos", "$A", "eos") if s in ends or s == "$A"]
    single = [s if s == "$A" else tokens[ends[s]] for s in order]
    backend.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, *(f"{'$B' if s == '$A' else s}:1" for s in single)],
        special_tokens=[(tokens[index], index) for index in dict.fromkeys(ends.values())],
    )


def _chat_templates(keys: Mapping[str, Any]) -> str | dict[str, str] | None:
    named = {
        name.removeprefix(CHAT_TEMPLATE_OF): text
        for name, text in keys.items()
        if name.startswith(CHAT_TEMPLATE_OF)
    }
    default: str | None = keys.get("chat_template")
    if not named:
        return default
    return named if default is None else {"default": default, **named}


def _needed(file: GgufFile, keys: Mapping[str, Any], name: str) -> Any:
    if name not in keys:
        raise file.bad(f"it lacks the key tokenizer.{name}")
    return keys[name]
