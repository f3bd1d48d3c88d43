"""Tokenizers whose tokens are whatever pieces of text a test wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from griffin_core.text.tokenizer import Tokenizer

_LETTERS = bytes_to_unicode()


class Pieces:
    """A byte-level tokenizer with a token for each byte, each piece and each special token. It
    encodes into bytes.

    Args:
        pieces: bytes of further tokens.
        special: texts of special tokens.
    """

    def __init__(self, pieces: Iterable[bytes] = (), special: Iterable[str] = ()) -> None:
        every = [bytes([b]) for b in range(256)]
        every += [piece for piece in dict.fromkeys(pieces) if len(piece) > 1]
        self._ids = {piece: token_id for token_id, piece in enumerate(every)}
        vocabulary = {"".join(_LETTERS[b] for b in p): i for p, i in self._ids.items()}
        backend = Backend(BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(special))
        self.special = {text: backend.token_to_id(text) for text in special}
        self.tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))

    def ids(self, *pieces: str | bytes) -> list[int]:
        """The tokens of pieces and special tokens."""
        return [
            self.special[p]
            if isinstance(p, str) and p in self.special
            else self._ids[p.encode() if isinstance(p, str) else p]
            for p in pieces
        ]


def chunkings(text: bytes) -> Iterator[list[bytes]]:
    """All ways to cut a text into pieces."""
    for cuts in range(1 << (len(text) - 1)):
        ends = [i + 1 for i in range(len(text) - 1) if cuts >> i & 1] + [len(text)]
        yield [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def parts(text: bytes) -> set[bytes]:
    """All pieces that a text can be cut into."""
    return {text[a:b] for a in range(len(text)) for b in range(a + 1, len(text) + 1)}


def llama2_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """The Llama 2 kind: a space before every text, byte fallback, a decoder that strips a space.

    Args:
        words: tokens of several letters. Letters stand for themselves.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    pieces += [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    backend = Backend(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
