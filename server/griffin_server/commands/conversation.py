"""A chat whose session stays on the server between turns, so that a turn sends only what is new.

A later turn of a session is a text that the server appends as it is: it does not render messages
there, since a chat template renders whole chats. ``TurnFormat`` finds out which text the template
puts around a later message of the user, and proves that it gives the template's own tokens. A turn
sends the whole chat where that cannot be proved, where the session is gone, and after a reply that
was broken off.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from griffin_client import (
    Event,
    Finished,
    GriffinClient,
    GriffinClientError,
    Message,
    NotFound,
    Started,
    Tokens,
)

QUESTION, ANSWER, NEXT_QUESTION = "Ready", "Certainly", "Thanks"
"""Messages of the chat by which a template is looked at: words that no template has."""

CLOSE_TIMEOUT_S = 5.0
"""Longest wait at the end for the server to free the session, in seconds."""


@dataclass(frozen=True, kw_only=True)
class TurnFormat:
    """The text around a later message of the user.

    Args:
        end_id: the token that ends an answer.
        end: its text.
        before: the text after it, up to the user's message.
        after: the text from the user's message to the model's next answer.
    """

    end_id: int
    end: str
    before: str
    after: str

    @classmethod
    def of(
        cls, client: GriffinClient, messages: list[Message], variables: Mapping[str, Any] | None
    ) -> TurnFormat | None:
        """Looks at the template of the server's model, which takes three short prompts.

        Args:
            messages: what the chat begins with: its system message, or nothing.
            variables: further variables of the chat template.

        Returns:
            None if text around a message does not give the template's tokens.
        """
        client = client.with_options(max_retries=0)
        pairs = [("user", QUESTION), ("assistant", ANSWER), ("user", NEXT_QUESTION)]
        try:
            chat = client.analyze_prompt(
                messages=[*messages, *pairs], chat_template_kwargs=variables
            )
            begin = boundary(chat.texts, ANSWER)
            if begin is None:
                return None
            # The end token is in the session already if the model has drawn it.
            for first in (begin, begin + 1):
                text = "".join(chat.texts[first:])
                alone = client.analyze_prompt(text, add_special_tokens=False)
                if alone.token_ids != chat.token_ids[first:]:
                    return None
        except GriffinClientError:
            return None
        before, found, after = "".join(chat.texts[begin + 1 :]).partition(NEXT_QUESTION)
        if not found:
            return None
        return cls(end_id=chat.token_ids[begin], end=chat.texts[begin], before=before, after=after)

    def turn(self, text: str, *, ended_by: int | None) -> str | None:
        """The prompt of a later turn.

        Args:
            text: the user's message.
            ended_by: the end-of-sequence token that the session's last answer has drawn; None if
                the answer ended otherwise.

        Returns:
            None if the answer ended with a token that is not the template's.
        """
        if ended_by is None:
            return f"{self.end}{self.before}{text}{self.after}"
        return f"{self.before}{text}{self.after}" if ended_by == self.end_id else None


def boundary(texts: tuple[str, ...], words: str) -> int | None:
    """The index of the token that begins where the last occurrence of some words ends; None if none
    begins there."""
    text = "".join(texts)
    found = text.rfind(words)
    length = 0
    for index, piece in enumerate(texts):
        if found >= 0 and length == found + len(words):
            return index
        length += len(piece)
    return None


class Conversation:
    """A chat with the model of a server.

    Args:
        client: not closed here.
        system: the system message, or None.
        variables: further variables of the chat template.
        options: the client's options of each turn.
    """

    def __init__(
        self,
        client: GriffinClient,
        *,
        system: str | None,
        variables: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> None:
        self._client = client
        self._variables = variables
        self._options: dict[str, Any] = {**options, "keep_session": True}
        self._system = [Message(role="system", content=system)] if system else []
        self.messages: list[Message] = list(self._system)
        self._session_id: str | None = None
        self._ended_by: int | None = None
        self._format: TurnFormat | None = None
        self._looked_at_format = False

    def reply(self, text: str) -> Generator[Event, None, None]:
        """Streams the events of the model's reply to a message.

        The chat keeps the message and what of the reply was streamed by the time that the iterator
        is closed; if that is no text at all, it keeps neither.

        Raises:
            GriffinClientError: the call failed.
        """
        self.messages.append(Message(role="user", content=text))
        session_id, self._session_id = self._session_id, None  # a broken turn frees it
        shown, last_id, turn_id, finished = "", None, None, False
        try:
            with closing(self._turn(text, session_id)) as events:
                for event in events:
                    match event:
                        case Started():
                            turn_id = event.session_id
                        case Tokens():
                            shown += event.text
                            last_id = event.ids[-1] if event.ids else last_id
                        case Finished():
                            finished = True
                            self._session_id = turn_id if event.session_kept else None
                            self._ended_by = last_id if event.reason == "eos" else None
                    yield event
        finally:
            if turn_id is None:  # no turn began, so the session is as it was
                self._session_id = session_id
            if shown or finished:
                self.messages.append(Message(role="assistant", content=shown))
            else:
                self.messages.pop()

    def close(self) -> None:
        """Frees the session on the server, if there is one."""
        if self._session_id is not None:
            with suppress(GriffinClientError):
                self._client.close_session(self._session_id, timeout=CLOSE_TIMEOUT_S)
            self._session_id = None

    def _turn(self, text: str, session_id: str | None) -> Generator[Event, None, None]:
        """The events of a turn: on the session if that is possible, else of the whole chat."""
        prompt = None if session_id is None else self._later_turn(text)
        if prompt is not None:
            with suppress(NotFound):  # it has expired, or gave way to others
                yield from self._client.generate(
                    prompt, session_id=session_id, add_special_tokens=False, **self._options
                )
                return
        elif session_id is not None:
            with suppress(GriffinClientError):
                self._client.close_session(session_id, timeout=CLOSE_TIMEOUT_S)
        yield from self._client.generate(
            messages=self.messages, chat_template_kwargs=self._variables, **self._options
        )

    def _later_turn(self, text: str) -> str | None:
        if not self._looked_at_format:
            self._format = TurnFormat.of(self._client, self._system, self._variables)
            self._looked_at_format = True
        return None if self._format is None else self._format.turn(text, ended_by=self._ended_by)
