"""docker-compose.yml without a container engine: what prefill, decode and Prometheus run, by hand.

Commands, settings and health checks are those of the file and of the image's Dockerfile. Only the
names of hosts and the ports are others, since here all services share one host.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from griffin_client import Finished, GriffinClient, Tokens
from tests.e2e.prometheus import ROOT, Prometheus, program
from tests.e2e.texts import ARTICLE
from tests.servers import eventually, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]  # servers that start one after the other

SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))[
    "services"
]
PROFILES = {
    "cpu": {"prefill", "decode", "prometheus", "grafana"},
    "gpu": {"prefill-gpu", "decode-gpu", "prometheus", "grafana"},
}
DOCKER_COMPOSE = shutil.which("docker-compose", path=f"{sys.prefix}/bin") or shutil.which(
    "docker-compose"
)


def image_instructions(name: str) -> list[str]:
    """The arguments of all instructions of that name in the image's last stage."""
    text = (ROOT / "deploy/docker/Dockerfile").read_text("utf-8").replace("\\\n", " ")
    last = re.split(r"^FROM .*$", text, flags=re.MULTILINE)[-1]
    return re.findall(rf"^{name}\s+(.*)$", last, flags=re.MULTILINE)


def image_environment() -> dict[str, str]:
    words = [word for line in image_instructions("ENV") for word in shlex.split(line)]
    set_ = dict(word.split("=", 1) for word in words)
    del set_["PATH"]  # of a machine with nothing else on it
    return set_


class Host:
    """Stands in for the network of the services: each one's ports are free ones of this host."""

    def __init__(self) -> None:
        self._ports: dict[tuple[str, str], int] = {}

    def port(self, service: str, port: str) -> int:
        return self._ports.setdefault((service, port), free_port())

    def here(self, service: str, text: str) -> str:
        """A text of a service's with the addresses in it as they are here."""
        names = "|".join(["localhost", *SERVICES])

        def address(match: re.Match[str]) -> str:
            name, port = match.groups()
            return f"localhost:{self.port(service if name == 'localhost' else name, port)}"

        return re.sub(rf"\b({names}):(\d+)\b", address, text)

    def published(self, service: str) -> str:
        """Where clients on this host find a service: what its only published port leads to."""
        (mapping,) = SERVICES[service]["ports"]
        return f"127.0.0.1:{self.port(service, mapping.rsplit(':', 1)[1])}"


@dataclass(frozen=True, kw_only=True)
class Container:
    """A service's process."""

    process: subprocess.Popen[bytes]
    log: Path
    check: list[str]
    check_timeout_s: float

    def wait_healthy(self, within_s: float) -> None:
        def healthy() -> bool:
            assert self.process.poll() is None, self.log.read_text("utf-8")
            try:
                done = subprocess.run(
                    self.check, capture_output=True, check=False, timeout=self.check_timeout_s
                )
            except subprocess.TimeoutExpired:
                return False
            return done.returncode == 0

        eventually(healthy, within_s=within_s)


@contextlib.contextmanager
def container(
    host: Host,
    name: str,
    command: list[str],
    where: Path,
    *,
    programs: dict[str, list[str]],
    environment: dict[str, str],
) -> Iterator[Container]:
    """Runs a command with a service's health check.

    Args:
        where: a directory for its log.
        programs: what a command's first word stands for.
    """

    def line(words: list[str]) -> list[str]:
        return [*programs[words[0]], *(host.here(name, word) for word in words[1:])]

    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    log = where / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            line(command), stdout=file, stderr=file, env={**os.environ, **environment}
        )
    try:
        yield Container(
            process=process,
            log=log,
            check=line(check["test"][1:]),
            check_timeout_s=float(check["timeout"].removesuffix("s")),
        )
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def griffin(host: Host, name: str, where: Path) -> Iterator[Container]:
    """Runs a Griffin service and waits until it is healthy."""
    service = SERVICES[name]
    given = {key: value for key, value in service["environment"].items() if value is not None}
    settings = {**image_environment(), **given}
    metrics_port = settings["GRIFFIN_METRICS_PORT"]
    (entrypoint,) = image_instructions("ENTRYPOINT")
    with container(
        host,
        name,
        [*json.loads(entrypoint), *service["command"]],
        where,
        programs={
            "griffin": [sys.executable, "-m", "griffin_server"],
            "python": [sys.executable],
        },
        environment={
            **settings,
            "GRIFFIN_PORT": str(host.port(name, "50051")),
            "GRIFFIN_METRICS_PORT": str(host.port(name, metrics_port)),
            "GRIFFIN_HANDOFF_DIR": str(where / "handoff"),
        },
    ) as running:
        running.wait_healthy(within_s=90)
        yield running


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


@pytest.fixture(scope="module")
def servers(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prefill and decode, one after the other, as decode's dependency wants it."""
    where = tmp_path_factory.mktemp("compose")
    assert SERVICES["decode"]["depends_on"] == {"prefill": {"condition": "service_healthy"}}
    with griffin(host, "prefill", where), griffin(host, "decode", where):
        yield


def test_decode_answers_with_a_prompt_that_prefill_ran(host: Host, servers: None) -> None:
    with GriffinClient(host.published("decode")) as client:
        events = list(client.generate(prompt=ARTICLE, max_tokens=8))
    assert any(isinstance(event, Tokens) for event in events)
    assert isinstance(events[-1], Finished)
    metrics = host.here("decode", "http://localhost:9464/metrics")
    with urllib.request.urlopen(metrics, timeout=10) as response:
        said = response.read().decode()
    pulled = re.search(
        r'griffin_handoff_bytes_total\{kind="kv",transport="shared_memory"\} (\S+)', said
    )
    assert pulled and float(pulled[1]) > 0


@pytest.mark.skipif(program("prometheus") is None, reason="no prometheus")
@pytest.mark.skipif(shutil.which("wget") is None, reason="no wget, which is in its image")
def test_prometheus_scrapes_both(host: Host, servers: None, tmp_path: Path) -> None:
    here = {
        "/etc/prometheus": str(shutil.copytree(ROOT / "deploy/prometheus", tmp_path / "etc")),
        "/prometheus": str(tmp_path / "data"),
    }
    config = tmp_path / "etc/prometheus.yml"
    config.write_text(host.here("prometheus", config.read_text("utf-8")), "utf-8")
    service = SERVICES["prometheus"]
    targets = {volume.split(":")[1] for volume in service["volumes"]}
    assert targets == set(here)
    at = re.compile(f"(?<==)({'|'.join(here)})")
    flags = [at.sub(lambda found: here[found[0]], flag) for flag in service["command"]]
    address = host.published("prometheus")
    with container(
        host,
        "prometheus",
        ["prometheus", *flags, f"--web.listen-address={address}"],
        tmp_path,
        programs={"prometheus": [str(program("prometheus"))], "wget": ["wget"]},
        environment={},
    ) as running:
        running.wait_healthy(within_s=30)
        watching = Prometheus(f"http://{address}")
        jobs = {"griffin-prefill", "griffin-decode"}
        eventually(
            lambda: {up["metric"]["job"] for up in watching.query("up == 1")} == jobs, within_s=30
        )


def test_the_image_checks_its_health_as_the_services_do() -> None:
    (check,) = image_instructions("HEALTHCHECK")
    command = json.loads(check.split("CMD", 1)[1])
    for name in ("prefill", "decode", "prefill-gpu", "decode-gpu"):
        assert SERVICES[name]["healthcheck"]["test"] == ["CMD", *command]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_on_a_gpu_it_is_the_same_service_under_the_same_name(role: str) -> None:
    cpu, gpu = SERVICES[role], SERVICES[f"{role}-gpu"]
    assert gpu["command"] == cpu["command"]
    only_here = {"GRIFFIN_DEVICE": "cuda"}
    if role == "decode":  # on the same card as prefill, which has no sessions to claim memory for
        only_here["GRIFFIN_MEMORY_FRACTION"] = "0.7"
    assert gpu["environment"] == {**cpu["environment"], **only_here}
    assert gpu["networks"]["servers"]["aliases"] == [role]
    assert set(gpu["networks"]) == set(cpu["networks"])
    assert gpu["volumes"] == cpu["volumes"]
    assert gpu.get("ports") == cpu.get("ports")


def test_containers_have_no_more_than_they_need() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"] and service["read_only"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["pids_limit"] and service["mem_limit"] and service["tmpfs"]
    assert SERVICES["decode"]["secrets"] == SERVICES["prefill"]["secrets"] == ["hf_token"]
    for service in SERVICES.values():  # a secret is a file, and no value of the environment
        words = ("TOKEN", "PASSWORD", "SECRET", "KEY")
        given = service.get("environment", {})
        named = [name for name in given if any(word in name for word in words)]
        assert all(given[name].startswith("/run/secrets/") for name in named)
    networks = {name: set(service["networks"]) for name, service in SERVICES.items()}
    assert "clients" not in networks["prefill"] | networks["prometheus"] | networks["grafana"]
    assert not networks["grafana"] & networks["decode"]
    shared = [v for v in SERVICES["decode"]["volumes"] if isinstance(v, dict)]
    assert [volume["target"] for volume in shared] == [
        SERVICES["decode"]["environment"]["GRIFFIN_HANDOFF_DIR"]
    ]


def test_grafana_finds_its_dashboards_and_its_prometheus() -> None:
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    files = {target: ROOT / source for source, target in mounts.items() if source[0] == "."}
    provisioning = files["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/griffin.yml").read_text("utf-8"))[
        "providers"
    ]
    dashboards = provider["options"]["path"]
    first = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (files[dashboards] / Path(first).relative_to(dashboards)).is_file()
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text("utf-8"))[
        "datasources"
    ]
    (published,) = SERVICES["prometheus"]["ports"]
    assert source["url"] == f"http://prometheus:{published.rsplit(':', 1)[1]}"


@pytest.mark.skipif(DOCKER_COMPOSE is None, reason="no docker-compose")
@pytest.mark.parametrize(
    ("arguments", "profile"), [([], "cpu"), (["--profile", "gpu"], "gpu")], ids=["default", "gpu"]
)
def test_compose_takes_the_file_and_starts_one_profile(arguments: list[str], profile: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMPOSE_")}
    done = subprocess.run(
        [str(DOCKER_COMPOSE), *arguments, "config", "--format", "json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    services = json.loads(done.stdout)["services"]
    assert set(services) == PROFILES[profile]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert sorted(port["published"] for port in ports) == ["3000", "50051", "9090"]


def test_the_image_is_built_from_all_that_the_package_is_made_of() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    made_of = {path.partition("/")[0] for path in (*wheel["packages"], *wheel["force-include"])}
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert made_of <= {line.removeprefix("!") for line in lines if line.startswith("!")}
