"""`griffin serve` as a process: live before it is ready, in poor surroundings, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from griffin_client import GriffinClient, Unavailable
from tests.servers import Process, eventually, free_port
from tests.unit.server.test_environment import KUBERNETES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

FOUR = {"max_tokens": 4, "ignore_eos": True}
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NOWHERE = "/proc/nowhere"
"""A directory that not even root can make."""
NO_CACHES = {name: NOWHERE for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR")}


@pytest.fixture
def model(tiny_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """Its servers run in float32, for which they compile no kernels."""
    monkeypatch.setenv("GRIFFIN_DTYPE", "float32")
    return str(tiny_directory("llama"))


def status(port: int, path: str) -> int | None:
    """Of an HTTP answer; None if there is none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return None


@pytest.mark.alone
def test_a_server_is_live_within_a_second_and_ready_later(model: str) -> None:
    def lively() -> float:
        """Seconds from the start to the first answer, at most."""
        port, metrics = free_port(), free_port()
        began = time.monotonic()
        arguments = ("--model", model, "--port", str(port), "--metrics-port", str(metrics))
        with Process(*arguments) as server:
            eventually(lambda: status(metrics, "livez") == 200)
            took = time.monotonic() - began
            assert status(metrics, "readyz") == status(metrics, "healthz") == 503
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                health = health_pb2_grpc.HealthStub(channel)
                request = health_pb2.HealthCheckRequest()
                answer = health.Check(request, timeout=10, wait_for_ready=True)
                assert answer.status == NOT_SERVING
                with pytest.raises(Unavailable) as refused:
                    GriffinClient(channel=channel, max_retries=0).complete("a")
                assert refused.value.reason == "NOT_READY"
            server.target()
            assert status(metrics, "livez") == status(metrics, "readyz") == 200
        return took

    assert min(lively() for _ in range(3)) < 1.0  # tests beside it may take the CPUs


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_at_once(
    number: signal.Signals, model: str, tmp_path: Path
) -> None:
    path = tmp_path / "griffin.sock"
    with Process("--model", model, "--host", f"unix:{path}") as server:
        eventually(lambda: any('"listening"' in line for line in server.log))
        began = time.monotonic()
        os.kill(server.pid, number)
        assert server.wait() == 128 + number
        assert time.monotonic() - began < 3
    assert not path.exists()
    assert not any("Traceback" in line or '"serving"' in line for line in server.log)


def test_a_model_that_cannot_be_loaded_ends_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "griffin.sock"
    with Process("--model", f"{tmp_path}/none", "--host", f"unix:{path}") as server:
        assert server.wait() == 1
    assert not path.exists()
    (line,) = [line for line in server.log if not line.startswith("{")]
    assert line.startswith("griffin: model: no such file or directory")


def test_the_socket_of_a_killed_server_is_replaced(model: str, tmp_path: Path) -> None:
    path = tmp_path / "griffin.sock"
    arguments = ("--model", model, "--host", f"unix:{path}")
    with Process(*arguments) as killed:
        killed.target()
        killed.kill()
    assert path.is_socket()
    with Process(*arguments) as server:
        assert server.target() == f"unix:{path}"
        with GriffinClient(f"unix:{path}", max_retries=0) as client:
            assert client.complete("a", **FOUR).finished.usage.generated_tokens == 4
    assert not path.exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": NOWHERE},
        {"HOME": "", "USER": "", "LOGNAME": ""},
        {**NO_CACHES, "GRIFFIN_DTYPE": "auto"},  # on most CPUs, numba compiles its kernels
    ],
    ids=["home", "no home", "no caches"],
)
def test_a_home_that_cannot_be_written_is_not_needed(
    environment: dict[str, str], model: str
) -> None:
    with (
        Process("--model", model, **environment) as server,
        GriffinClient(server.target(), max_retries=0) as client,
    ):
        assert client.complete("a", **FOUR).finished.usage.generated_tokens == 4
    assert all(json.loads(line)["level"] == "info" for line in server.log)


def test_without_a_temporary_directory_it_ends_in_one_line(model: str) -> None:
    """As with a read-only root and nothing mounted at /tmp."""
    code = (
        f"import tempfile; tempfile._candidate_tempdir_list = lambda: [{NOWHERE!r}]; "
        "from griffin_server.__main__ import main; main()"
    )
    # torch, in this process, has put its choice into the environment.
    usual = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--model", model, "--port", "0"],
        capture_output=True,
        text=True,
        timeout=100,
        env=usual,
        check=False,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if '"listening"' not in line]
    assert line.startswith("griffin: torch cannot be imported") and "TMPDIR" in line


def test_beside_a_kubernetes_service_of_its_name_it_starts(model: str, tmp_path: Path) -> None:
    config = tmp_path / "griffin.toml"
    config.write_text("port = 0\n")
    with Process("--model", model, "--config", str(config), **KUBERNETES) as server:
        assert server.target().startswith("127.0.0.1:")
    (note,) = [json.loads(line) for line in server.log if '"warning"' in line]
    assert "Kubernetes" in note["event"] and "GRIFFIN_PORT" in note["event"]
