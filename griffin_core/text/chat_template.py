"""A model's chat template: it is tried when the model is loaded, and renders chats as text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from griffin_core.errors import InvalidRequest, shortened
from griffin_core.text.renderers import RENDERERS, RenderFailed, TooSlow

MOST_WORDS = 200
"""The most characters of a template's error that a message repeats, since a gRPC status must fit 8
KiB."""

_PROBE = "probe7content"
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG"
"""transformers appends this tag to the last message to find where to cut the text. If a template
shows that message twice, one tag stays in the text."""

_PROBE_ROLES = ("user", "human", "system", "assistant")


@dataclass(frozen=True, kw_only=True)
class _Use:
    """How one template takes messages.

    Args:
        as_parts: whether a message's content is a list of parts, ``{"type": "text", "text": ...}``,
            instead of a string.
        unusable: why no message can be rendered with it; empty if it can be used.
    """

    as_parts: bool = False
    unusable: str = ""


class ChatTemplate:
    """Renders chats with the template of a tokenizer.

    At construction a trial message is rendered to find out whether the template can be used, and
    whether it takes content as a string or as parts: the rendered text must contain the content.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # As transformers gives them to a template.
        self._special_tokens = {
            name: token if isinstance(token, list) else str(token)
            for name, token in tokenizer.special_tokens_map.items()
        }
        self._uses: dict[str, _Use] = {}
        self._reserved = (
            {"messages"}
            | set(inspect.signature(tokenizer.apply_chat_template).parameters)
            | set(inspect.signature(render_jinja_template).parameters)
        ) - {"tools", "documents"}
        self.unusable = self._use(None)[1].unusable
        """Why chats cannot be rendered; empty if they can."""

    def render(
        self,
        messages: Sequence[tuple[str, str]],
        *,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a chat as a prompt for the model's answer.

        Args:
            messages: (role, content) pairs, at least one.
            continue_final_message: whether the text ends with the text of the last message, for the
                model to continue, as in transformers.
            variables: further variables of the template; ``tools`` and ``documents`` as in
                transformers.

        Raises:
            InvalidRequest: no usable template exists, the template fails, or a variable has a
                reserved name.
        """
        variables = variables or {}
        self._check(variables)
        template, use = self._use(variables.get("tools"))
        if use.unusable:
            raise InvalidRequest(
                "messages", f"{len(messages)} messages", f"text or token_ids: {use.unusable}"
            )
        try:
            text = self._rendered(
                template, messages, use.as_parts, continue_final_message, variables
            )
        except RenderFailed as error:
            if error.kind == "ValueError" and error.words.startswith("continue_final_message"):
                raise InvalidRequest(
                    "continue_final_message", True, f"false here: {_words(error)}"
                ) from error
            roles = ", ".join(role for role, _ in messages[:8])
            raise InvalidRequest(
                "messages", f"roles {roles}", f"the template's: {_words(error)}"
            ) from error
        if continue_final_message and _CONTINUED in text:
            raise InvalidRequest(
                "continue_final_message",
                True,
                "false here: the template shows the last message more than once",
            )
        return text

    def _check(self, variables: Mapping[str, Any]) -> None:
        if taken := sorted(self._reserved & variables.keys()):
            raise InvalidRequest(
                "chat_template_kwargs",
                ", ".join(taken),
                "names that neither the request nor transformers uses for something else",
            )
        for name in ("tools", "documents"):
            value = variables.get(name)
            if value is not None and not (
                isinstance(value, list) and all(isinstance(item, dict) for item in value)
            ):
                raise InvalidRequest(f"chat_template_kwargs.{name}", value, "a list of objects")

    def _use(self, tools: Any) -> tuple[str, _Use]:
        """Returns the template for chats with these tools, and how to use it."""
        stored = self._tokenizer.chat_template
        if not stored:
            return "", _Use(unusable="no chat template")
        try:
            template: str = self._tokenizer.get_chat_template(None, tools)
        except ValueError:
            names = ", ".join(sorted(stored))
            return "", _Use(
                unusable=f"no chat template named default; there are {names}"[:MOST_WORDS]
            )
        if template not in self._uses:
            self._uses[template] = self._try(template)
        return template, self._uses[template]

    def _try(self, template: str) -> _Use:
        why = "the chat template does not show the messages' content"
        refused = False
        for role in _PROBE_ROLES:
            for as_parts in (False, True):
                try:
                    text = self._rendered(template, [(role, _PROBE)], as_parts, False, {})
                except RenderFailed as error:
                    # Raised by raise_exception(): the template refuses this chat, not every chat.
                    refused |= error.kind == "TemplateError"
                    if not as_parts:
                        why = f"the chat template fails: {_words(error)}"
                    if isinstance(error, TooSlow):
                        return _Use(unusable=why)
                else:
                    if _PROBE in text.lower():
                        return _Use(as_parts=as_parts)
        return _Use() if refused else _Use(unusable=why)

    def _rendered(
        self,
        template: str,
        messages: Sequence[tuple[str, str]],
        as_parts: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        chat = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
            for role, text in messages
        ]

        return RENDERERS.render(
            conversations=[chat],
            chat_template=template,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            **{**self._special_tokens, **variables},
        )


def _words(error: RenderFailed) -> str:
    """Returns what a template raised in one short line."""
    words = " ".join(error.words.split())
    return shortened(words if error.of_template else f"{error.kind}: {words}", MOST_WORDS)
