"""The command: text for people, JSON for machines, one line for a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from griffin_core.model.load import Model
from griffin_server.commands import COMMANDS
from tests.servers import Running, running


def griffin(
    *arguments: str, given: str = "", status: int = 0, **environment: str
) -> tuple[str, str]:
    """Runs the command; its standard output and error."""
    done = subprocess.run(
        [sys.executable, "-m", "griffin_server", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        env={
            "PATH": "/usr/bin:/bin",
            "TERM": "dumb",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **environment,
        },
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_generate_streams_text_and_ends_in_a_line_of_figures(tiny_server: Running) -> None:
    target = ("--target", tiny_server.target, "--raw")
    out, err = griffin("generate", "abc", *target, "--max-tokens", "5", "--density", "0.5")
    assert out.strip()
    (line,) = err.strip().splitlines()
    assert line.startswith("3 + ")
    for words in ("tokens/s", "FF density 0.5 (44/88)", "first token"):
        assert words in line
    assert "norm mass" not in line  # which is no measure of how good the text is


def test_generate_reads_standard_input_and_files(tiny_server: Running, tmp_path: Path) -> None:
    options = ("--target", tiny_server.target, "--raw", "--max-tokens", "3", "--json")
    (tmp_path / "prompt.txt").write_text("abc", encoding="utf-8")
    given = griffin("generate", "abc", *options)[0]
    piped = griffin("generate", "-", *options, given="abc")[0]
    read = griffin("generate", f"@{tmp_path / 'prompt.txt'}", *options)[0]
    texts = [[e for e in lines(out) if e["event"] == "tokens"] for out in (given, piped, read)]
    assert texts[0] == texts[1] == texts[2]


def test_generate_as_json_is_an_event_a_line(tiny_server: Running) -> None:
    out, err = griffin(
        "generate", "abc", "--target", tiny_server.target, "--max-tokens", "3", "--json"
    )
    events = lines(out)
    assert events[0]["event"] == "started"
    assert events[-1]["event"] == "finished"
    assert events[-1]["pruning"]["ff_width"] == 88
    assert err == ""


def test_the_target_may_come_from_the_environment(tiny_server: Running) -> None:
    out, _ = griffin("info", "--json", GRIFFIN_TARGET=tiny_server.target)
    (info,) = lines(out)
    assert info["model"]["family"] == "llama"
    assert info["sessions"] == []


def test_info_is_a_table(tiny_server: Running) -> None:
    out, _ = griffin("info", "--target", tiny_server.target)
    assert "default sampling" in out and "greedy" in out
    assert "ff width" in out and "88" in out and tiny_server.app.engine.model.fingerprint[:9] in out


def test_chat_remembers_what_was_said(tiny_server: Running) -> None:
    target = ("--target", tiny_server.target, "--max-tokens", "3", "--json")
    out, _ = griffin("chat", *target, "--system", "Be brief.", given="hi\nwhy\n\n")
    started = [event for event in lines(out) if event["event"] == "started"]
    first, second = started
    assert second["session_id"] == first["session_id"]  # which holds the first turn
    # The last token of the first reply, which was only drawn, and what is new. A byte is a token.
    assert second["prompt_tokens"] == 1 + len("\n<user>why\n<assistant>")
    with tiny_server.client() as client:
        assert client.list_sessions() == []


def test_chat_without_a_template_says_what_to_do(tiny: Callable[[str], Model]) -> None:
    with running(tiny("opt")) as server:
        _, err = griffin("chat", "--target", server.target, given="hi\n", status=1)
    assert "no chat template" in err and "griffin generate --raw" in err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["generate", "a", "--target", "127.0.0.1:1", "--timeout", "5"], 1, "UNAVAILABLE"),
        (["generate", "@/no/such/file", "--target", "127.0.0.1:1"], 1, "/no/such/file"),
        (["serve", "--density", "7"], 2, "density: got '7'"),
        (["serve", "--config", "/no/such/file"], 2, "/no/such/file"),
        (["serve", "--port", "0", "--model", "/no/such/model"], 1, "no such file or directory"),
        (["serve", "--role", "decode"], 2, "role decode needs one"),
        (["serve", "--device", "cuda:77"], 1, "device: got cuda:77; allowed: cpu"),
        (["serve", "--memory-fraction", "2"], 2, "memory_fraction: got '2'"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], status: int, words: str) -> None:
    out, err = griffin(*arguments, status=status)
    assert out == ""
    assert words in err
    assert "Traceback" not in err


def test_a_refused_request_is_one_line(tiny_server: Running) -> None:
    _, err = griffin(
        "generate", "a", "--raw", "--target", tiny_server.target, "--density", "2", status=1
    )
    assert err.strip() == ("griffin: INVALID_ARGUMENT: pruning.density: got 2.0; allowed: (0, 1]")


def test_a_port_that_is_taken_is_one_line(
    tiny_server: Running, tiny_directory: Callable[[str], Path]
) -> None:
    port = tiny_server.target.rpartition(":")[2]
    model = str(tiny_directory("llama"))
    for option in ("port", "metrics-port"):
        _, err = griffin("serve", "--model", model, "--port", "0", f"--{option}", port, status=1)
        name = option.replace("-", "_")
        said = f"griffin: host, {name}: cannot listen on 127.0.0.1:{port} (Address already in use)"
        assert err.strip() == said  # and nothing of a load


def test_a_device_without_room_is_one_line(tiny_directory: Callable[[str], Path]) -> None:
    model = str(tiny_directory("llama"))
    arguments = ("--model", model, "--dtype", "float32", "--port", "0", "--memory-fraction", "1e-9")
    out, err = griffin("serve", *arguments, "--log-level", "warning", status=1)
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("griffin: session memory: 1e-09 of what the machine has free is")


def test_without_the_servers_packages_the_command_says_which_it_needs() -> None:
    code = (
        "import sys; sys.modules['typer'] = None; from griffin_server.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("griffin: no module typer: the command needs the extra `server`")


def test_help_of_serve_lists_every_setting() -> None:
    out, _ = griffin("serve", "--help", COLUMNS="200")
    for flag in ("--model", "--role", "--prefill-target", "--density", "--threads", "--config"):
        assert flag in out


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_imports_no_machine_learning(command: list[str]) -> None:
    """A user waits for what help imports, and torch alone takes seconds."""
    heavy = "{'torch', 'numba', 'triton', 'transformers', 'numpy', 'matplotlib', 'lm_eval'}"
    script = (
        "import sys\nfrom griffin_server.__main__ import main\n"
        f"sys.argv = ['griffin', *{[*command, '--help']}]\n"
        "try:\n    main()\nfinally:\n"
        f"    print(sorted({heavy} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert "usage" in done.stdout.lower()
    assert done.stderr.strip() == "[]"


def test_bench_reports_latencies_of_a_server_under_load(tiny_server: Running) -> None:
    load = ("--requests", "6", "--prompt-tokens", "3:20", "--output-tokens", "5:9")
    target = ("--target", tiny_server.target)
    (result,) = lines(griffin("bench", *target, *load, "--density", "0.5", "--json")[0])
    assert (result["completed"], result["errors"]) == (6, {})
    assert 6 * 3 <= result["prompt_tokens"] <= 6 * 20
    assert 6 * 5 <= result["generated_tokens"] <= 6 * 9
    assert result["sampling"] == {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
    for name in (
        "time_to_first_token_s",
        "stream_token_s",
        "inter_token_latency_s",
        "message_gap_s",
        "end_to_end_s",
    ):
        values = result[name]
        assert 0 < values["p50"] <= values["p90"] <= values["p99"]
    out, _ = griffin("bench", *target, *load, "--rate", "50", "--sharing", "shared")
    for words in ("6 completed", "tokens/s", "p99", "time to first token", "between tokens"):
        assert words in out


def test_bench_repeats_a_load_for_the_same_seed(tiny_server: Running) -> None:
    load = ("bench", "--target", tiny_server.target, "--requests", "5", "--json")
    lengths = ("--prompt-tokens", "1:50", "--output-tokens", "1:30", "--seed")
    one, same, other = (lines(griffin(*load, *lengths, seed)[0])[0] for seed in "778")
    counts = [(run["prompt_tokens"], run["generated_tokens"]) for run in (one, same, other)]
    assert counts[0] == counts[1] != counts[2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "abc\n\nabcdef\n"),
        ("texts.jsonl", '{"text": "abc"}\n{"prompt": "abcdef", "text": ""}\n'),
    ],
)
def test_bench_takes_prompts_from_a_file_in_turn(
    name: str, content: str, tiny_server: Running, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    load = ("--requests", "3", "--output-tokens", "2", "--temperature", "0", "--json")
    file = ("--prompts", str(tmp_path / name))
    (result,) = lines(griffin("bench", "--target", tiny_server.target, *load, *file)[0])
    around = len("<user>\n<assistant>")  # the chat template; a byte is a token
    assert result["completed"] == 3
    assert result["prompt_tokens"] == (3 + around) + (6 + around) + (3 + around)
    assert result["sampling"]["temperature"] == 0


def test_bench_counts_errors_by_status(tiny_server: Running) -> None:
    load = ("--requests", "3", "--prompt-tokens", "5000", "--json")
    out, err = griffin("bench", "--target", tiny_server.target, *load, status=1)
    (result,) = lines(out)
    assert result["errors"] == {"INVALID_ARGUMENT": 3}
    assert "5000 tokens" in result["error_messages"]["INVALID_ARGUMENT"]
    assert "no request finished" in err
    out, _ = griffin("bench", "--target", tiny_server.target, *load[:-1], status=1)
    assert "3 × INVALID_ARGUMENT: token_ids" in out and "milliseconds" not in out


def test_a_prefill_server_is_told_from_others(tiny: Callable[[str], Model]) -> None:
    with running(tiny("llama"), role="prefill") as server:
        for command in (["generate", "a"], ["top", "--once"], ["info"]):
            _, err = griffin(*command, "--target", server.target, status=1)
            assert "UNIMPLEMENTED" in err and "a server in role prefill?" in err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--prompt-tokens", "0", "prompt-tokens: got '0'"),
        ("--output-tokens", "9:3", "output-tokens: got '9:3'"),
        ("--rate", "0", "rate: got 0"),
        ("--rate", "nan", "rate: got nan"),
        ("--temperature", "-1", "temperature: got -1"),
        ("--top-p", "0", "top-p: got 0"),
        ("--prompts", "/no/such/file", "/no/such/file"),
        ("--prompts", "/dev/null", "needs one text per line"),
    ],
)
def test_bench_refuses_bad_options_by_name(
    option: str, value: str, words: str, tiny_server: Running
) -> None:
    _, err = griffin("bench", "--target", tiny_server.target, option, value, status=2)
    assert words in err and "Traceback" not in err
