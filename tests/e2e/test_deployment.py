"""The commands of the guide's page on deployment start servers, on a tiny model."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from griffin_client import GriffinClient
from tests.e2e.pages import run_griffin
from tests.pages import arguments, code_blocks, commands, read_page, sections
from tests.servers import Process, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PAGE = sections(read_page("docs/guide/deployment.md"))


def serve_arguments(section: str) -> list[list[str]]:
    """The arguments of `griffin serve` in a section."""
    return [arguments(line)[1:] for block in commands(PAGE[section]) for line in block]


@pytest.fixture(autouse=True)
def model(tiny_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, for which a server compiles no kernels."""
    monkeypatch.setenv("GRIFFIN_MODEL", str(tiny_directory("llama")))
    monkeypatch.setenv("GRIFFIN_DTYPE", "float32")


def test_prefill_and_decode_run_as_separate_processes(tmp_path: Path) -> None:
    ports = {port: str(free_port()) for port in ("50052", "50053")}
    with ExitStack() as servers:
        started = [
            servers.enter_context(
                Process(
                    *(re.sub("|".join(ports), lambda found: ports[found[0]], one) for one in given)
                )
            )
            for given in serve_arguments("Prefill and decode as separate processes")
        ]
        targets = [server.target() for server in started]
        assert targets[:2] == [f"127.0.0.1:{port}" for port in ports.values()]
        command = 'griffin generate "Why is the sky blue on most days of a year?" --max-tokens 40'
        assert run_griffin(command, tmp_path, targets[-1]).strip()


def test_a_server_takes_its_settings_from_the_file(tmp_path: Path) -> None:
    ((flag, name),) = serve_arguments("Settings")
    (file,) = code_blocks(PAGE["Settings"], "toml")
    assert "port = 50060\n" in file
    port = str(free_port())
    (tmp_path / name).write_text(file.replace("50060", port), encoding="utf-8")
    with Process(flag, str(tmp_path / name), GRIFFIN_PORT="") as server:
        assert server.target() == f"127.0.0.1:{port}"


def test_a_server_listens_on_a_unix_socket(tmp_path: Path) -> None:
    ((flag, address),) = serve_arguments("Addresses and Unix sockets")
    directory = address.removeprefix("unix:").rpartition("/")[0]
    address = address.replace(directory, str(tmp_path))
    with Process(flag, address) as server:
        assert server.target() == address
        with GriffinClient(address) as client:
            assert client.model_info(timeout=10).layers
