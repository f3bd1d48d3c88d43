"""`griffin chat` in a terminal, with a real server and the packaged model."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from griffin_client import GriffinClient
from griffin_core.model.load import Model
from griffin_server.commands.conversation import Conversation, TurnFormat
from tests.servers import Running, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

FIGURES = re.compile(r"(\d+) \+ (\d+) tokens")
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Chat:
    """`griffin chat` on a terminal that controls it, as a shell's does: Ctrl-C comes as SIGINT."""

    def __init__(self, state: Path, *arguments: str) -> None:
        pid, self._terminal = pty.fork()
        if pid == 0:  # the child: only exec from here on
            environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(state)}
            command = [sys.executable, "-m", "griffin_server", "chat", *arguments]
            os.execve(sys.executable, command, environment)
        self._pid = pid
        self.status: int | None = None

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def read(self, pattern: str, *, within_s: float = 60) -> str:
        """What it shows from now on, until that matches a pattern."""
        shown, deadline = "", time.monotonic() + within_s
        while not re.search(pattern, shown):
            ready, _, _ = select.select(
                [self._terminal], [], [], max(0, deadline - time.monotonic())
            )
            assert ready, f"no {pattern!r} within {within_s} s in {shown!r}"
            try:
                shown += os.read(self._terminal, 65536).decode(errors="replace")
            except OSError:  # Linux says so when the program has ended
                raise AssertionError(f"it ended: {shown!r}") from None
        return shown

    def say(self, text: str) -> tuple[int, int, str]:
        """Tokens that a turn has prefilled and generated, and what was shown."""
        self.type(f"{text}\r")
        shown = self.read(r"tokens/s[^\n]*\n.*> $")
        found = FIGURES.search(shown)
        assert found is not None, shown
        return int(found[1]), int(found[2]), shown

    def exit_code(self, *, within_s: float = 30) -> int:
        """Reads on until the program has ended."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if select.select([self._terminal], [], [], 0.05)[0]:
                try:
                    os.read(self._terminal, 65536)
                except OSError:
                    break
        _, status = os.waitpid(self._pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)
        os.close(self._terminal)


@pytest.fixture
def chat(smollm2_server: Running, tmp_path: Path) -> Iterator[Callable[..., Chat]]:
    def begin(*arguments: str) -> Chat:
        return Chat(tmp_path, "--target", smollm2_server.target, *arguments)

    yield begin
    with smollm2_server.client() as client:
        eventually(lambda: client.list_sessions() == [])


def prompt_tokens(model: Model, *messages: tuple[str, str]) -> int:
    return len(model.tokenizer.encode_chat(messages))


def test_a_turn_prefills_only_what_is_new(
    chat: Callable[..., Chat], smollm2: Model, smollm2_server: Running
) -> None:
    with chat("--max-tokens", "8") as terminal:
        terminal.read("> $")
        first, generated, _ = terminal.say("What is a compiler? Answer in one short sentence.")
        assert first == prompt_tokens(
            smollm2, ("user", "What is a compiler? Answer in one short sentence.")
        )
        assert generated == 8
        second, *_ = terminal.say("Why?")
        new = "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        # The last token of the first reply had not been run yet: it was only drawn.
        assert second == 1 + len(smollm2.tokenizer.encode(new))
        third, *_ = terminal.say("Why?")
        assert third == second
        with smollm2_server.client() as client:
            (session,) = client.list_sessions()
        assert session.context_tokens == first + (second - 1) + (third - 1) + 3 * 8
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0


def test_ctrl_c_ends_the_reply_and_then_the_program(
    chat: Callable[..., Chat], smollm2: Model, smollm2_server: Running
) -> None:
    question = "Tell me a very long story about a dragon."
    with chat("--max-tokens", "2000", "--temperature", "0") as terminal:
        terminal.read("> $")
        terminal.type(f"{question}\r")
        terminal.read(r"\n\w+ \w+")
        terminal.type(CTRL_C)
        terminal.read(r"the reply was ended[^\n]*\n.*> $")
        with smollm2_server.client() as client:
            eventually(lambda: client.list_sessions() == [])  # the call was cancelled
        terminal.type("And then?\r")
        terminal.read(r"\n\w+ \w+")
        with smollm2_server.client() as client:
            (session,) = client.list_sessions()
        # All of the chat, with what was shown of the reply.
        least = prompt_tokens(smollm2, ("user", question), ("assistant", ""), ("user", "And then?"))
        assert session.context_tokens > least
        terminal.type(CTRL_C)
        terminal.read(r"the reply was ended[^\n]*\n.*> $")
        terminal.type(CTRL_C)
        assert terminal.exit_code() == 0


def test_lines_can_be_edited_and_come_back_in_the_next_chat(
    chat: Callable[..., Chat], tmp_path: Path
) -> None:
    file = tmp_path / "griffin" / "chat_history"
    with chat("--max-tokens", "2") as terminal:
        terminal.read("> $")
        terminal.say("helo\x1b[Dl")  # left, then the missing letter
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0
    assert file.read_text().splitlines()[-1] == "hello"
    assert file.stat().st_mode & 0o777 == 0o600
    with chat("--max-tokens", "2") as terminal:
        terminal.read("> $")
        _, _, shown = terminal.say(UP)
        assert "hello" in shown
        terminal.type("\r")  # an empty line
        assert terminal.exit_code() == 0


def test_a_session_that_is_gone_is_replaced_by_the_whole_chat(
    smollm2: Model, smollm2_server: Running
) -> None:
    with smollm2_server.client() as client:
        talk = Conversation(client, system="Be brief.", variables=None, options={"max_tokens": 4})
        list(talk.reply("Hi"))
        (session,) = client.list_sessions()
        client.close_session(session.session_id)
        started, *_ = talk.reply("Why?")
        assert started.prompt_tokens == prompt_tokens(
            smollm2, *((m.role, m.content) for m in talk.messages[:-1])
        )
        started, *_ = talk.reply("Why?")
        assert started.prompt_tokens < 20
        talk.close()
        assert client.list_sessions() == []


def test_a_kept_chat_says_what_the_whole_chat_says(smollm2: Model, smollm2_server: Running) -> None:
    with smollm2_server.client() as client:
        talk = Conversation(client, system=None, variables=None, options={"max_tokens": 24})
        for question in ("What is the capital of France?", "And of Italy?", "Thank you."):
            list(talk.reply(question))
            *before, said = talk.messages
            whole = client.complete(messages=before, max_tokens=24)
            assert said.content == whole.text
        talk.close()


def test_the_turns_of_the_packaged_model_are_those_of_its_template(
    smollm2_server: Running,
) -> None:
    with GriffinClient(smollm2_server.target) as client:
        turns = TurnFormat.of(client, [], None)
    assert turns is not None
    around = "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert turns.turn("Why?", ended_by=turns.end_id) == around
    assert turns.turn("Why?", ended_by=None) == "<|im_end|>" + around
    assert turns.turn("Why?", ended_by=turns.end_id + 1) is None
