"""The page with four servers, TLS, keys and Prometheus, run as it is written but for its ports."""

from __future__ import annotations

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from griffin_client import GriffinClient, Tls, Unauthenticated, Unavailable
from tests.e2e.prometheus import Prometheus, program
from tests.e2e.texts import ROOT
from tests.servers import eventually, free_port
from tests.unit.server.security.test_planes import code_of, credentials, prefill

PAGE = ROOT / "docs/guide/one-machine.md"
NODE = shutil.which("node")
EXAMPLE = ROOT / "client/examples/node"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(program("prometheus") is None, reason="no prometheus"),
]


class Machine:
    """The commands of the page in a directory, at free ports."""

    def __init__(self, where: Path) -> None:
        blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
        # Loops write ports as 5110$n: two free ports that differ in their last digit are hard to
        # have, so each is a variable.
        ports = [f"51{digit}0{n}" for digit in range(1, 6) for n in (1, 2)]
        self.ports = {port: str(free_port()) for port in (*ports, "51600")}
        self.blocks = [self._moved(block) for block in blocks]
        self.where = where
        places = [str(Path(sys.executable).parent), str(Path(str(program("prometheus"))).parent)]
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("GRIFFIN_")},
            "PATH": os.pathsep.join([*places, os.environ["PATH"]]),
            **{f"PORT_{port}": mine for port, mine in self.ports.items()},
        }

    def _moved(self, block: str) -> str:
        block = re.sub(r"\b(51\d0)\$n", r"$(eval echo \\$PORT_\1$n)", block)
        return re.sub(r"\b51\d0\d\b", lambda found: self.ports[found[0]], block)

    def run(self, script: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euc", script],
            cwd=self.where,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )

    def begin(self, script: str) -> subprocess.Popen[bytes]:
        log = (self.where / "log").open("ab")
        with log:
            return subprocess.Popen(
                ["bash", "-uc", f"{script}\nwait"],
                cwd=self.where,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("machine"))
    certificates, key, prefills, decodes, prometheus, *_ = made.blocks
    done = made.run(certificates)
    assert done.returncode == 0, done.stderr
    assert made.run(key).returncode == 0
    begun = [made.begin(block) for block in (prefills, decodes, prometheus)]

    def ready() -> bool:
        try:
            for port in ("51501", "51502"):
                url = f"http://localhost:{made.ports[port]}/readyz"
                with urllib.request.urlopen(url, timeout=2):
                    pass
        except OSError:
            return False
        return True

    try:
        eventually(ready, within_s=120)
        # The prefill servers may still load their models.
        eventually(lambda: made.run(made.blocks[5]).returncode == 0, within_s=120)
        yield made
    finally:
        for process in begun:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def test_alice_calls_both(machine: Machine) -> None:
    done = machine.run(machine.blocks[5])
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second != ""


@pytest.mark.skipif(
    NODE is None or not (EXAMPLE / "node_modules").is_dir(), reason="no Node.js or no packages"
)
def test_the_example_for_node_calls_with_tls_and_a_key(machine: Machine) -> None:
    script = f"cd {EXAMPLE} && {machine.blocks[6]}"
    key = (machine.where / "alice.key").read_text().strip()
    ca = str(machine.where / "ca.pem")
    done = machine.run(script, GRIFFIN_CA_CERT=ca, GRIFFIN_API_KEY=key)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10
    refused = machine.run(script, GRIFFIN_CA_CERT=ca, GRIFFIN_API_KEY=key[:-1])
    assert refused.returncode == 1 and "UNAUTHENTICATED" in refused.stderr


def test_strangers_get_nowhere(machine: Machine) -> None:
    ca = machine.where / "ca.pem"
    for port in ("51301", "51302"):
        target = f"localhost:{machine.ports[port]}"
        with (
            GriffinClient(target, tls=Tls(ca=ca), max_retries=0) as client,
            pytest.raises(Unauthenticated),
        ):
            client.model_info()
        with (
            GriffinClient(target, max_retries=0, timeout=5) as plain,
            pytest.raises(Unavailable),
        ):
            plain.model_info()
    with grpc.secure_channel(
        f"localhost:{machine.ports['51101']}", credentials(ca, None)
    ) as channel:
        assert code_of(prefill, channel) == "UNAVAILABLE"
    context = ssl.create_default_context(cafile=str(ca))
    with pytest.raises(OSError, match=r"alert|reset|closed|EOF"):
        urllib.request.urlopen(
            f"https://localhost:{machine.ports['51401']}/metrics", context=context, timeout=5
        )


def test_prometheus_scrapes_all_four_and_both_prefill_servers_work(machine: Machine) -> None:
    watching = Prometheus(f"http://127.0.0.1:{machine.ports['51600']}")

    def up() -> bool:
        try:
            return sum(float(row["value"][1]) for row in watching.query("up")) == 4
        except OSError:
            return False

    eventually(up, within_s=90)
