"""Chat templates: whether they can be used is known at load; however they fail, the request is
refused in few words."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from griffin_core.errors import InvalidRequest
from griffin_core.text import renderers
from griffin_core.text.chat_template import MOST_WORDS
from griffin_core.text.tokenizer import Tokenizer, load_tokenizer
from tests.servers import eventually, is_alive, process_state
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer

PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)
ONLY_HUMANS = "{% for m in messages if m.role == 'human' %}H: {{ m.content }}{% endfor %}"
REFUSES = (
    "{% if messages[0].role != 'pirate' %}{{ raise_exception('arr') }}{% endif %}"
    "{{ messages[0].content }}"
)
QWEN_LIKE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% endif %}"
    "{% if depth is defined %}{{ depth + 1 }}{% endif %}"
)


def with_template(template: Any) -> Tokenizer:
    tokenizer = byte_tokenizer(with_template=False)
    tokenizer.chat_template = template
    return Tokenizer(tokenizer)


def chat(tokenizer: Tokenizer, *messages: tuple[str, str], **settings: Any) -> str:
    return tokenizer.decode(tokenizer.encode_chat(messages or [("user", "hi")], **settings))


def renderers_of(parent: int) -> list[int]:
    """The processes of this one that render."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            after_name = path.read_text().rpartition(")")[2].split()
            command = path.with_name("cmdline").read_bytes()
            if int(after_name[1]) == parent and b"render_worker" in command:
                found.append(int(path.parent.name))
    return found


def refusal(tokenizer: Tokenizer, *messages: tuple[str, str], **settings: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        chat(tokenizer, *messages, **settings)
    assert len(str(refused.value)) < 2 * MOST_WORDS
    return refused.value


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHAT_TEMPLATE, "<user>hi\n<assistant>"),
        (PARTS, "<user>hi"),
        # takes both: a string, as transformers' own users pass it
        (
            "{% for m in messages %}{{ m.content if m.content is string else 'X' }}{% endfor %}",
            "hi",
        ),
        # fails on a string
        ("{% for m in messages %}{{ m.content[0]['text'] }}{% endfor %}", "hi"),
        ("{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}", "hi"),
        ({"default": CHAT_TEMPLATE, "rag": "R"}, "<user>hi\n<assistant>"),
    ],
)
def test_content_is_a_string_or_parts_as_the_template_reads_it(template: Any, text: str) -> None:
    tokenizer = with_template(template)
    assert tokenizer.has_chat_template
    assert chat(tokenizer) == text


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "no chat template"),
        ({"rag": "R", "tool_use": "T"}, "there are rag, tool_use"),
        ("no content at all", "does not show the messages' content"),
        ("{% for m in messages %}{{ m.text }}{% endfor %}", "does not show"),
        ("{% if %}", "the chat template fails: Expected an expression"),
        ("{{ messages[0].content | nothing }}", "the chat template fails: No filter named"),
        ("{{ missing.thing }}", "'missing' is undefined"),
        ("{{ 1 + 'a' }}", "the chat template fails: TypeError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "is unsafe"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_cannot_be_used_is_none(template: Any, why: str) -> None:
    tokenizer = with_template(template)
    assert not tokenizer.has_chat_template
    refused = refusal(tokenizer)
    assert refused.field == "messages"
    assert why in refused.allowed
    assert "text or token_ids" in refused.allowed


@pytest.mark.parametrize(
    "condition",
    ["messages[0].content == 'hi'", "true"],
    ids=["for one chat", "for each"],
)
def test_a_template_without_end_is_stopped(condition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderers, "RENDER_S", 0.5)
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd")
    tokenizer = with_template(
        "{{ messages[0].content }}{% if "
        + condition
        + " %}"
        + loops
        + "{% endfor %}" * 4
        + "{% endif %}"
    )
    assert "longer than 0.5 s" in refusal(tokenizer).allowed
    assert tokenizer.has_chat_template == (condition != "true")
    eventually(
        lambda: (
            not [process for process in renderers_of(os.getpid()) if process_state(process) == "R"]
        )
    )
    if condition != "true":
        assert chat(tokenizer, ("user", "you")) == "you"


@pytest.mark.parametrize(
    ("template", "role", "text"),
    [(ONLY_HUMANS, "human", "H: hi"), (REFUSES, "pirate", "hi")],
)
def test_a_template_for_other_roles_than_the_usual_ones_can_be_used(
    template: str, role: str, text: str
) -> None:
    tokenizer = with_template(template)
    assert tokenizer.has_chat_template
    assert chat(tokenizer, (role, "hi")) == text


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("raise_exception('Unexpected role: ' + m.role)", "Unexpected role: xxx"),
        ("raise_exception(missing)", ""),
        ("m.role + 1", "TypeError"),
        ("m.nothing.more", "no attribute 'nothing'"),
        ("m['content']['no']['such']", "no attribute 'no'"),
        ("m.content.index('y')", "ValueError"),
        ("m.content.__class__.__mro__", "unsafe"),
        ("[1][m.content | length | int * 0 + 7].x", "list object has no element 7"),
        ("strftime_now(3)", "TypeError"),
        ("'%d' % m.role", "TypeError"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal_in_few_words(fails: str, words: str) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}"
        f"{{% if m.role == 'xxx' %}}{{{{ {fails} }}}}{{% endif %}}{{% endfor %}}"
    )
    refused = refusal(with_template(template), ("user", "a"), ("xxx", "漢" * 5000))
    assert refused.field == "messages"
    assert words in refused.allowed


def test_variables_reach_the_template_as_transformers_hands_them_over() -> None:
    tokenizer = with_template(QWEN_LIKE)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tokenizer) == "<|user|>hi<|end|><|assistant|>"
    variables = {"enable_thinking": False, "tools": tools, "depth": 2}
    theirs = byte_tokenizer(with_template=False)
    theirs.chat_template = QWEN_LIKE
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        tokenize=False,
        add_generation_prompt=True,
        **variables,
    )
    assert chat(tokenizer, variables=variables) == expected
    assert expected.endswith("<no>3")


def test_tools_take_the_template_for_them_as_in_transformers() -> None:
    tokenizer = with_template({"default": CHAT_TEMPLATE, "tool_use": "T:" + PARTS})
    assert chat(tokenizer, variables={"tools": [{"name": "f"}]}) == "T:<user>hi"
    assert chat(tokenizer) == "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("variables", "field", "given"),
    [
        ({"messages": []}, "chat_template_kwargs", "messages"),
        ({"tokenize": True, "add_generation_prompt": False}, "chat_template_kwargs", "tokenize"),
        ({"continue_final_message": True}, "chat_template_kwargs", "continue_final_message"),
        ({"chat_template": "x"}, "chat_template_kwargs", "chat_template"),
        ({"conversations": []}, "chat_template_kwargs", "conversations"),
        ({"tools": "f"}, "chat_template_kwargs.tools", "f"),
        ({"tools": ["f"]}, "chat_template_kwargs.tools", "['f']"),
        ({"documents": [1]}, "chat_template_kwargs.documents", "[1]"),
    ],
)
def test_variables_that_are_something_else_are_refused(
    variables: dict[str, Any], field: str, given: str
) -> None:
    refused = refusal(with_template(QWEN_LIKE), variables=variables)
    assert (refused.field, given in refused.given) == (field, True)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS, QWEN_LIKE])
@pytest.mark.parametrize("content", ["The sea is", " spaces  ", "", "漢字 😀"])
def test_the_final_message_is_continued_as_in_transformers(template: str, content: str) -> None:
    messages = [("user", "A poem."), ("assistant", content)]
    theirs = byte_tokenizer(with_template=False)
    theirs.chat_template = template
    parts = template is PARTS
    expected = theirs.apply_chat_template(
        [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in messages
        ],
        tokenize=False,
        continue_final_message=True,
    )
    got = chat(with_template(template), *messages, continue_final_message=True)
    assert got == expected
    assert got.endswith(content)


def test_a_final_message_that_the_template_changes_cannot_be_continued() -> None:
    tokenizer = with_template("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    messages = [("user", "a"), ("assistant", "b" * 900)]
    assert chat(tokenizer, *messages) == "A" + "B" * 900
    refused = refusal(tokenizer, *messages, continue_final_message=True)
    assert refused.field == "continue_final_message"
    assert "does not appear" in refused.allowed


@pytest.mark.parametrize("again", ["{{ messages[-1].content }}", "{{ messages[-1].content }}!"])
def test_a_final_message_that_the_template_shows_twice_cannot_be_continued(again: str) -> None:
    tokenizer = with_template(f"{again}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}")
    messages = [("user", "a"), ("assistant", "b")]
    assert "ab" in chat(tokenizer, *messages)
    refused = refusal(tokenizer, *messages, continue_final_message=True)
    assert refused.field == "continue_final_message"
    assert "more than once" in refused.allowed


def test_templates_in_a_models_files_are_read(tmp_path: Path) -> None:
    byte_tokenizer(with_template=False).save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    values = json.loads(config.read_text())

    def loaded(**templates: str) -> Tokenizer:
        stored = [{"name": name, "template": template} for name, template in templates.items()]
        config.write_text(json.dumps({**values, "chat_template": stored}))
        return load_tokenizer(str(tmp_path))

    assert chat(loaded(default=PARTS, rag="R")) == "<user>hi"
    named = loaded(rag="R", tool_use="T")
    assert not named.has_chat_template
    assert "there are rag, tool_use" in refusal(named).allowed


# -- the processes that render ---------------------------------------------------------------------

GROWS = (
    "{% if messages[0].content == 'hi' %}{% set ns = namespace(x='a' * 1000000) %}"
    "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{% endif %}"
    "{{ messages[0].content }}"
)
LARGE = (
    "{{ messages[0].content }}{% if messages[0].content == 'hi' %}{{ 'a' * 20000000 }}{% endif %}"
)


@pytest.mark.parametrize(("template", "words"), [(GROWS, "Memory"), (LARGE, "characters")])
def test_a_template_that_takes_more_and_more_memory_is_stopped(template: str, words: str) -> None:
    tokenizer = with_template(template)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in refusal(tokenizer).allowed
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 200 << 10
    assert chat(tokenizer, ("user", "you")) == "you"


def test_a_template_in_a_process_that_is_killed_is_refused_and_the_next_is_rendered() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    for process in renderers_of(os.getpid()):
        os.kill(process, signal.SIGKILL)
        eventually(lambda process=process: not is_alive(process))  # type: ignore[misc]
    assert chat(tokenizer) == "<user>hi\n<assistant>"  # nobody was using it
    slow = "".join(f"{{% for {name} in range(99999) %}}" for name in "ab") + "{% endfor %}" * 2
    slow_one = with_template(
        "{% if messages[0].content == 'hi' %}" + slow + "{% endif %}{{ messages[0].content }}"
    )
    (process,) = renderers_of(os.getpid())

    def kill() -> None:
        eventually(lambda: process_state(process) == "R")
        os.kill(process, signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    assert "its process has ended" in refusal(slow_one).allowed
    killing.join()
    assert chat(tokenizer) == "<user>hi\n<assistant>"


def test_many_threads_render_in_few_processes() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    with ThreadPoolExecutor(8) as threads:
        texts = [("user", f"number {number}") for number in range(40)]
        made = list(threads.map(lambda message: chat(tokenizer, message), texts))
    assert made == [f"<user>number {number}\n<assistant>" for number in range(40)]
    assert 1 <= len(renderers_of(os.getpid())) <= renderers.MOST_PROCESSES


def test_a_process_that_renders_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_API_KEY", "secret")
    renderers.RENDERERS.close()
    chat(with_template(CHAT_TEMPLATE))
    (process,) = renderers_of(os.getpid())
    assert b"secret" not in Path(f"/proc/{process}/environ").read_bytes()


def test_they_end_with_the_process_that_began_them() -> None:
    code = (
        "import os, sys; from tests.unit.core.test_chat_template import *; "
        "chat(with_template(CHAT_TEMPLATE)); print(*renderers_of(os.getpid()), flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    (process,) = map(int, done.stdout.split())
    eventually(lambda: not is_alive(process))
