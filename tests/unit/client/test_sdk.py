"""The habits of the SDK: keywords, the target, the version, and its two clients from one source."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import griffin_client
from griffin_client import (
    AsyncGriffinClient,
    GriffinClient,
    InvalidArgument,
    errors,
    options,
    types,
)
from griffin_client.channel import target_or_default
from tests.servers import Running

MAKE_SYNC = Path(__file__).parents[3] / "client" / "make_sync.py"

THREE: dict[str, Any] = {"max_tokens": 3, "ignore_eos": True}


def test_the_sync_client_is_what_the_async_one_gives() -> None:
    made = runpy.run_path(str(MAKE_SYNC))
    text = made["synchronous"](made["SOURCE"].read_text(encoding="utf-8"))
    assert made["RESULT"].read_text(encoding="utf-8") == text, "run `make client`"


def test_the_version_is_that_of_the_distribution() -> None:
    assert griffin_client.__version__ == version("griffin-serving")


def test_the_version_is_looked_up_only_when_it_is_asked_for() -> None:
    code = "import sys, griffin_client; assert 'importlib.metadata' not in sys.modules"
    subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path}; {code}"],
        check=True,
        timeout=60,
    )


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Client'"):
        griffin_client.Client  # noqa: B018


@pytest.mark.parametrize("kind", [GriffinClient, AsyncGriffinClient])
@pytest.mark.parametrize("method", ["generate", "stream_text"])
async def test_an_unknown_keyword_is_refused_before_the_call(kind: Any, method: str) -> None:
    client = kind("localhost:1")
    with pytest.raises(TypeError) as caught:
        getattr(client, method)("a", max_token=3)
    message = str(caught.value)
    assert message.startswith(f"{method}() got an unexpected keyword argument 'max_token'; ")
    assert "did you mean 'max_tokens'?" in message
    assert all(name in message for name in options.GenerateOptions.__annotations__)


@pytest.mark.parametrize(
    ("method", "arguments", "name"),
    [
        ("complete", ("a",), "sampling"),
        ("score", ("a", "b"), "temperature"),
        ("score_choices", ("a", ["b"]), "max_tokens"),
        ("analyze_prompt", ("a",), "sharing"),
        ("model_info", (), "timeout_s"),
        ("get_session", ("a",), "timeout_s"),
        ("list_sessions", (), "timeout_s"),
        ("close_session", ("a",), "timeout_s"),
    ],
)
async def test_no_method_takes_another_ones_keywords(
    method: str, arguments: tuple[Any, ...], name: str
) -> None:
    expected = rf"^{method}\(\) got an unexpected keyword argument '{name}'; .*allowed: "
    with GriffinClient("localhost:1") as client, pytest.raises(TypeError, match=expected):
        getattr(client, method)(*arguments, **{name: 1})
    async with AsyncGriffinClient("localhost:1") as other:
        with pytest.raises(TypeError, match=expected):
            await getattr(other, method)(*arguments, **{name: 1})


@pytest.mark.parametrize("kind", [GriffinClient, AsyncGriffinClient])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("timeout", 0),
        ("timeout", -1.5),
        ("timeout", True),
        ("max_retries", -1),
        ("max_retries", 1.5),
        ("max_retries", None),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused(kind: Any, setting: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        kind("localhost:1", **{setting: value})
    assert list(caught.value.violations) == [setting]
    assert "allowed: " in caught.value.message


def test_the_target_comes_from_the_argument_the_environment_or_is_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GRIFFIN_TARGET", raising=False)
    assert target_or_default(None) == "localhost:50051"
    monkeypatch.setenv("GRIFFIN_TARGET", "griffin.example.com:50051")
    assert target_or_default(None) == "griffin.example.com:50051"
    assert target_or_default("10.0.0.1:50051") == "10.0.0.1:50051"


async def test_both_clients_call_the_target_of_the_environment(
    tiny_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_TARGET", tiny_server.target)
    with GriffinClient() as client:
        info = client.model_info()
    async with AsyncGriffinClient() as other:
        assert await other.model_info() == info


async def test_the_pieces_of_a_text_stream_are_the_text(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        whole = client.complete("abc", **THREE).text
        pieces = list(client.stream_text("abc", **THREE))
    async with AsyncGriffinClient(tiny_server.target) as other:
        assert [text async for text in other.stream_text("abc", **THREE)] == pieces
    assert "".join(pieces) == whole
    assert all(pieces)


def test_closing_a_text_stream_cancels_the_call(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        texts = client.stream_text("abc", max_tokens=250, ignore_eos=True, keep_session=True)
        next(texts)
        texts.close()
        assert [s for s in client.list_sessions() if s.state == "idle"] == []


def test_one_stop_string_needs_no_list(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        text = client.complete("abc", max_tokens=20, ignore_eos=True).text
        stop = text[4:6]
        alone = client.complete("abc", max_tokens=20, ignore_eos=True, stop=stop)
        listed = client.complete("abc", max_tokens=20, ignore_eos=True, stop=[stop])
    assert (alone.text, alone.finished.stop) == (listed.text, stop)


def test_none_leaves_an_option_to_the_server(tiny_server: Running) -> None:
    nothing = dict.fromkeys(options.GenerateOptions.__annotations__)
    with tiny_server.client() as client:
        assert client.complete("abc", **nothing).token_ids == client.complete("abc").token_ids


def test_a_client_with_other_options_uses_the_same_connection(tiny_server: Running) -> None:
    with GriffinClient(tiny_server.target, timeout=30) as client:
        with client.with_options(max_retries=5) as other:
            assert (other.timeout, other.max_retries) == (30, 5)
            assert other.model_info() == client.model_info()
        assert client.with_options(timeout=1).timeout == 1
        assert (client.timeout, client.max_retries) == (30, 2)
        assert client.model_info()  # closing the other one left the connection open


@pytest.mark.parametrize("module", [griffin_client, errors, types, options])
def test_all_that_is_public_has_a_docstring(module: Any) -> None:
    for name, item in vars(module).items():
        if name.startswith("_") or not inspect.isclass(item):
            continue
        if item.__module__.startswith("griffin_client"):
            assert item.__doc__, name
            for method, function in vars(item).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    assert function.__doc__, f"{name}.{method}"


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = re.findall(r"^    (?:[├└]── )?([A-Z]\w+)  ", errors.__doc__ or "", re.MULTILINE)
    kinds = [errors.GriffinClientError, *errors.GriffinClientError.__subclasses__()]
    assert drawn == [kind.__name__ for kind in kinds]
