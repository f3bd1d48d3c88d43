"""The example for Node.js, which knows Griffin from protos/ alone, against a live server."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.e2e.texts import ROOT
from tests.servers import Running, eventually

EXAMPLE = ROOT / "client/examples/node"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(
    NODE is None or not (EXAMPLE / "node_modules").is_dir(),
    reason="no Node.js or no packages for the example: make installs them where there is npm",
)

ANSWERED_AT_LENGTH = "Write a long story about a lighthouse."


def generate(server: Running, prompt: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(NODE), "generate.js", server.target, prompt, *options],
        cwd=EXAMPLE,
        env={},  # no proxy that grpc-js would take
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_streams_the_text_that_the_python_client_streams(smollm2_server: Running) -> None:
    prompt = "What is the capital of France?"
    done = generate(smollm2_server, prompt, "--deadline-s", "60")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "FINISH_REASON_EOS"
    with smollm2_server.client() as client:
        same = client.complete(messages=[("user", prompt)], max_tokens=256)
    assert done.stdout == same.text
    assert "Paris" in same.text


@pytest.mark.parametrize(
    ("option", "value", "status"),
    [("--deadline-s", "0.5", "DEADLINE_EXCEEDED"), ("--cancel-after", "5", "CANCELLED")],
)
def test_a_deadline_or_a_cancel_ends_the_call_and_its_session(
    smollm2_server: Running, option: str, value: str, status: str
) -> None:
    done = generate(smollm2_server, ANSWERED_AT_LENGTH, option, value)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().startswith(f"{status}: ")
    assert done.stdout or status != "CANCELLED"  # what came before it
    with smollm2_server.client() as client:
        eventually(lambda: client.list_sessions() == [])


def test_an_error_is_printed_with_its_status_and_message(smollm2_server: Running) -> None:
    done = generate(smollm2_server, "word " * 10_000)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().startswith("INVALID_ARGUMENT: ")
    assert "got 10031 tokens; allowed: at most 8192, the context length" in done.stderr
