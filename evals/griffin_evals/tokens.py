"""Converts text to token ids by the rules of lm-eval's ``hf`` model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.models.utils import has_bos_prefix

from griffin_core.model.files import local_directory
from griffin_core.model.hub import resolve
from griffin_core.model.load import quiet
from griffin_core.text.tokenizer import load_tokenizer


class HfTokens:
    """A tokenizer, used as lm-eval's ``hf`` uses it.

    Args:
        tokenizer: a fast tokenizer of transformers.
        add_bos_token: whether texts get the tokenizer's special tokens; None for its default.
        chat_template_args: further variables of the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        add_bos_token: bool | None,
        chat_template_args: Mapping[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self._add_bos_token = add_bos_token
        self._chat_template_args = dict(chat_template_args)
        self._prefix_text = tokenizer.decode(self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prefix: int = eos if bos is None else bos
        return prefix

    @property
    def eos_text(self) -> str:
        """The text of the EOS token, which ends a completion besides the strings of a task."""
        text: str = self.tokenizer.decode(self.tokenizer.eos_token_id, skip_special_tokens=False)
        return text

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Returns the token ids of a context, or of a context and its continuation.

        Args:
            add_special_tokens: None for ``add_bos_token``; no special tokens are added if the text
                already begins with one.
        """
        return self._encode(text, add_special_tokens, self._prefix_text)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the token ids of a prompt to complete."""
        return self._encode(text, None, self.tokenizer.bos_token)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """Renders a chat as text, without its system message if the template does not support
        one."""
        try:
            return self._render(messages, add_generation_prompt)
        except TemplateError:
            others = [message for message in messages if message["role"] != "system"]
            return self._render(others, add_generation_prompt)

    def _encode(self, text: str, add_special_tokens: bool | None, bos: str | None) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = False if has_bos_prefix(text, bos) else self._add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(text, **options)
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_template_args,
        )
        return text


def tokenizer_of(name: str) -> Any:
    """Returns the tokenizer of a model, a fast one of transformers.

    Args:
        name: a model name that ``load_model`` accepts.

    Raises:
        ModelError: it does not exist or cannot be read.
    """
    with quiet():
        directory: Path = local_directory(name, resolve(name, torch.float32, lambda _: None))
        return load_tokenizer(str(directory)).fast
