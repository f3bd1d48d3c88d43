"""Converts text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from griffin_core.errors import BadModelFile, InvalidRequest
from griffin_core.text.chat_template import ChatTemplate
from griffin_core.text.control_tokens import ControlTokens
from griffin_core.text.stream import TextStream, TokenDecoder

CHARACTERS_PER_TOKEN = 16
"""If a text has more characters per token that fits than this, only its beginning is tokenized at
first. Ordinary text has about 4."""


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        tokenizer: a "fast" tokenizer of transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer: Any = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # tokenizer.json may store what a training script set
        self._backend.no_padding()
        self._added_after = self._count_added_after()
        self._decoder = TokenDecoder(self._backend)
        self._chat = ChatTemplate(tokenizer)
        self._control = ControlTokens(self._backend)
        self.control_tokens_in_content = False
        """Whether the text of a control token in a message becomes that token, as in transformers,
        so that who writes a message can end its turn. Otherwise it stays text."""

    @property
    def fast(self) -> Any:
        """The transformers tokenizer that this class wraps."""
        return self._tokenizer

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a usable chat template."""
        return not self._chat.unusable

    @property
    def no_chat_because(self) -> str:
        """Why chats cannot be rendered; empty if they can."""
        return self._chat.unusable

    def encode(
        self,
        text: str,
        *,
        special_tokens: bool = True,
        most: int | None = None,
        field: str = "text",
    ) -> list[int]:
        """Tokenizes ``text``, optionally with the tokenizer's special tokens, such as a BOS.

        Args:
            most: the most tokens that are allowed; None for any number. If the beginning of a long
                text alone has more than twice as many, the rest is not tokenized.
            field: the name of the text's field, for errors.

        Raises:
            InvalidRequest: the text has more than ``most`` tokens.
        """
        ids: list[int] = self._encoding(text, special_tokens, most, field).ids
        return ids

    def encode_inner(self, text: str) -> list[int]:
        """Tokenizes a text as it would be after a line break, without the space that sentencepiece
        puts before a text. Returns no ids if the tokenizer merges the text with the line break."""
        line_break = self.encode("\n", special_tokens=False)
        both = self.encode(f"\n{text}", special_tokens=False)
        return both[len(line_break) :] if both[: len(line_break)] == line_break else []

    def encode_pair(
        self,
        context: str,
        continuation: str,
        *,
        special_tokens: bool = True,
        most: int | None = None,
    ) -> tuple[list[int], list[int]]:
        """Tokenizes context and continuation together, and splits the ids where the continuation
        begins.

        If the ids do not begin with those of the context alone, the continuation begins at the
        first token that contains a part of it, though this token may also contain a part of the
        context. Special tokens after a text, such as an EOS, are left out.

        Args:
            most: see ``encode``.

        Raises:
            InvalidRequest: the context, or both together, have more than ``most`` tokens.
        """
        texts = {"context": context, "continuation": context + continuation}
        first, whole = (self._encoding(t, special_tokens, most, f) for f, t in texts.items())
        for encoding in (first, whole) if special_tokens and self._added_after else ():
            encoding.truncate(len(encoding) - self._added_after)
        before, ids = first.ids, whole.ids
        split = len(before)
        if ids[:split] != before:
            # The end of each token in characters of the text; 0 for tokens outside it, such as a
            # BOS.
            ends = [end for _, end in whole.offsets]
            split = next((i for i, end in enumerate(ends) if end > len(context)), len(ids))
            # The ends refer to the text before normalization.
            if self._joined_by_normalizer(context, continuation):
                pairs = enumerate(zip(ids, before, strict=False))
                # The continuation may merge with tokens of the context.
                shorter = min(len(ids), len(before))
                split = next((i for i, (now, then) in pairs if now != then), shorter)
        return ids[:split], ids[split:]

    def encode_chat(
        self,
        messages: Sequence[tuple[str, str]],
        *,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Tokenizes a chat as a prompt for the model's answer.

        Args:
            messages, continue_final_message, variables: see ``ChatTemplate.render``.
            most: see ``encode``.

        Raises:
            InvalidRequest: as by ``ChatTemplate.render`` and ``encode``.
        """
        variables = variables or {}
        hidden = None
        if not self.control_tokens_in_content:
            hidden = self._control.hidden(messages, variables)
        if hidden is not None:
            messages, variables = hidden.messages, hidden.variables
        text = self._chat.render(
            messages, continue_final_message=continue_final_message, variables=variables
        )
        if hidden is None:
            return self.encode(text, special_tokens=False, most=most, field="messages")
        text, spans = hidden.shown(text)
        encoding = self._encoding(text, False, most, "messages")
        ids = self._control.without(encoding, text, spans, most=most)
        if most is not None and len(ids) > most:
            raise _too_many("messages", len(ids), most)
        return ids

    def ordinary_tokens_from(self, first: int) -> list[str]:
        """Returns the tokens with an id of ``first`` or more, without added tokens."""
        added = self._backend.get_added_tokens_decoder()
        vocabulary = self._backend.get_vocab(with_added_tokens=False).items()
        return [text for text, token in vocabulary if token >= first and token not in added]

    def special_text(self, token_id: int) -> str | None:
        """Returns the text of a special token; None for any other token."""
        return self._decoder.special_texts.get(token_id)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ``ids``, by default without special tokens."""
        return self._decoder.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_one(self, token_id: int) -> str:
        """Returns the text of one token by itself, special tokens shown."""
        return self._decoder.decode([token_id], skip_special_tokens=False)

    def stream(self, before: Sequence[int] = (), *, skip_special_tokens: bool = True) -> TextStream:
        """Returns a new incremental decoder for a completion.

        Args:
            before: the ids before the completion: all that the session holds.
        """
        return TextStream(self._decoder, before, skip_special_tokens=skip_special_tokens)

    def _joined_by_normalizer(self, context: str, continuation: str) -> bool:
        """Returns whether the normalizer joins characters across the boundary, such as a letter and
        its accent."""
        if (normalizer := self._backend.normalizer) is None:
            return False
        whole = normalizer.normalize_str(context + continuation)
        return not whole.startswith(normalizer.normalize_str(context))

    def _encoding(self, text: str, special_tokens: bool, most: int | None, field: str) -> Any:
        """Returns a ``tokenizers.Encoding``, which knows its length without making a list of
        ids."""
        if most is None:
            return self._encoded(text, special_tokens)
        size = CHARACTERS_PER_TOKEN * most
        while size < len(text):
            # Cutting a text changes a few tokens at the cut, but not half of them, so this is too
            # long.
            if (count := len(self._encoded(text[:size], special_tokens))) > 2 * most:
                raise InvalidRequest(
                    field,
                    f"{len(text)} characters, of which the first {size} are {count} tokens",
                    f"at most {most} tokens, the context length",
                )
            size *= 4
        encoding = self._encoded(text, special_tokens)
        if len(encoding) > most:
            raise _too_many(field, len(encoding), most)
        return encoding

    def _encoded(self, text: str, special_tokens: bool) -> Any:
        # A batch of one, since encode() holds the interpreter's lock, which blocks the engine's
        # thread.
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=special_tokens)
        return encoding

    def _count_added_after(self) -> int:
        """Returns the number of special tokens that the tokenizer adds after a text."""
        one_token = tokenizers.Tokenizer(WordLevel({"": 0}, unk_token="")).encode("a")
        added: list[int] = self._backend.post_process(one_token).special_tokens_mask
        return len(added) - 1 - added.index(0)


def _too_many(field: str, count: int, most: int) -> InvalidRequest:
    return InvalidRequest(field, f"{count} tokens", f"at most {most}, the context length")


def load_tokenizer(where: str) -> Tokenizer:
    """Loads the tokenizer of a directory or hub id.

    Raises:
        BadModelFile: it does not exist, cannot be read, or has no fast form. The message is one
            line and names the file at fault.
    """
    needs_sentencepiece = _only_sentencepiece(Path(where))
    if needs_sentencepiece and find_spec("sentencepiece") is None:
        raise BadModelFile(
            "tokenizer.model: reading it takes the package sentencepiece, which is not installed; "
            "install it, or put a tokenizer.json beside it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # each tokenizer class raises errors of its own
        if needs_sentencepiece:
            raise BadModelFile(
                "tokenizer.model: sentencepiece cannot read it; put a tokenizer.json beside it"
            ) from error
        words = " ".join(str(error).split())[:300]
        file = _broken_file(Path(where)) or "tokenizer: cannot load it"
        raise BadModelFile(f"{file} ({type(error).__name__}: {words})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise BadModelFile(
            f"tokenizer: {type(tokenizer).__name__} has no fast form, which is needed"
        )
    # transformers makes an empty tokenizer if it finds no file for a class.
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().keys()
    if backend.get_vocab_size(with_added_tokens=False) <= len(added):
        vocabulary = set(backend.get_vocab(with_added_tokens=False).values())
        if vocabulary <= added:
            raise BadModelFile(
                f"tokenizer: {type(tokenizer).__name__} has no tokens but special ones; is "
                "tokenizer.json missing?"
            )
    return Tokenizer(tokenizer)


def _only_sentencepiece(directory: Path) -> bool:
    others = ("tokenizer.json", "vocab.json", "tekken.json")
    return (directory / "tokenizer.model").exists() and not any(
        (directory / name).exists() for name in others
    )


def _broken_file(directory: Path) -> str:
    """Returns the tokenizer file that cannot be read, and why; empty if all can be read."""
    files = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for file in (directory / name for name in files):
        try:
            if file.exists() and not isinstance(json.loads(file.read_text("utf-8")), dict):
                return f"{file.name}: is not a JSON object"
        except (OSError, ValueError):
            return f"{file.name}: cannot be read"
    if (file := directory / "tokenizer.json").exists():
        try:
            tokenizers.Tokenizer.from_file(str(file))
        except Exception:  # tokenizers raises a plain Exception
            return "tokenizer.json: is not a tokenizer that the library tokenizers reads"
    elif directory.is_dir():
        return "tokenizer: the model has no tokenizer.json"
    return ""
