"""A chat that keeps its session, and what it does where that is not possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from griffin_client import GriffinClient, InvalidArgument
from griffin_server.commands import conversation
from griffin_server.commands.chat import history_file
from griffin_server.commands.conversation import Conversation, TurnFormat
from tests.servers import Running, eventually


def talk(client: GriffinClient, **options: Any) -> Conversation:
    usual = {"max_tokens": 3, "ignore_eos": True}
    return Conversation(client, system=None, variables=None, options={**usual, **options})


def sent(chat: Conversation, text: str) -> int:
    """Tokens that a turn prefills."""
    started, *_ = chat.reply(text)
    return started.prompt_tokens  # type: ignore[union-attr]


def test_without_a_known_format_a_turn_sends_the_whole_chat_and_frees_the_last_session(
    tiny_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TurnFormat, "of", lambda *_: None)
    with tiny_server.client() as client:
        chat = talk(client)
        assert sent(chat, "hi") == len("<user>hi\n<assistant>")
        whole = "<user>hi\n<assistant>" + chat.messages[1].content + "\n<user>why\n<assistant>"
        assert sent(chat, "why") == len(whole.encode())
        assert len(client.list_sessions()) == 1
        chat.close()
        assert client.list_sessions() == []


def test_text_that_does_not_give_the_templates_tokens_is_no_format(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        assert TurnFormat.of(client, [], None) is not None
        real = client.analyze_prompt

        class Other:
            """Tokenizes texts otherwise than chats."""

            def with_options(self, **_: Any) -> Other:
                return self

            def analyze_prompt(self, prompt: str | None = None, **options: Any) -> Any:
                return real(None if prompt is None else f" {prompt}", **options)

        assert TurnFormat.of(Other(), [], None) is None  # type: ignore[arg-type]


def test_a_server_that_cannot_analyze_prompts_gives_no_format(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        assert TurnFormat.of(client, [], {"messages": 1}) is None  # which it refuses


def test_a_reply_that_is_broken_off_stays_in_the_chat_as_far_as_it_was_shown(
    tiny_server: Running,
) -> None:
    with tiny_server.client() as client:
        chat = talk(client, max_tokens=200)
        events, shown = chat.reply("hi"), ""
        while len(shown) < 5:
            shown += getattr(next(events), "text", "")
        events.close()
        assert [m.content for m in chat.messages] == ["hi", shown]
        eventually(lambda: client.list_sessions() == [])
        events = chat.reply("never")
        next(events)
        events.close()  # before any text
        assert [m.content for m in chat.messages] == ["hi", shown]
        eventually(lambda: client.list_sessions() == [])
        whole = f"<user>hi\n<assistant>{shown}\n<user>why\n<assistant>"
        assert sent(chat, "why") == len(whole.encode())
        chat.close()


def test_a_message_that_the_server_refuses_is_not_kept(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        chat = talk(client, temperature=-1.0)
        with pytest.raises(InvalidArgument):
            list(chat.reply("hi"))
        assert chat.messages == []


def test_a_later_message_that_the_server_refuses_leaves_the_session_to_the_chat(
    tiny_server: Running,
) -> None:
    with tiny_server.client() as client:
        chat = talk(client)
        sent(chat, "hi")
        list(chat.reply("there"))
        (session,) = client.list_sessions()
        with pytest.raises(InvalidArgument):
            list(chat.reply("x" * 100_000))
        assert [each.session_id for each in client.list_sessions()] == [session.session_id]
        chat.close()
        assert client.list_sessions() == []


@pytest.mark.parametrize(
    ("texts", "begins"),
    [
        (("a", "Certainly", "b"), 2),
        (("Cert", "ainly", "b"), 2),
        (("Certainly.", "b"), None),
        (("Certainly",), None),
        (("a", "b"), None),
    ],
)
def test_an_answer_ends_where_a_token_begins(texts: tuple[str, ...], begins: int | None) -> None:
    assert conversation.boundary(texts, "Certainly") == begins


def test_the_history_is_in_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_file() == Path("/state/griffin/chat_history")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert history_file() == Path("/home/somebody/.local/state/griffin/chat_history")
