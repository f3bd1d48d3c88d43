"""A real Prometheus for tests: Debian's, which `make` puts into .venv, or the one on the PATH."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.servers import eventually, free_port

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules"
_UNPACKED = Path(sys.prefix) / "prometheus/usr/bin"


def program(name: str) -> str | None:
    """Where ``prometheus`` or ``promtool`` is."""
    return shutil.which(name, path=str(_UNPACKED)) or shutil.which(name)


class Prometheus:
    """One that runs.

    Args:
        url: of its HTTP API.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of an answer of its API.

        Raises:
            urllib.error.HTTPError: a query does not parse, say.
        """
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of an expression."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def value(self, expression: str) -> float | None:
        """Of an expression with one result; None if there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None


@contextlib.contextmanager
def prometheus(where: Path, jobs: dict[str, str]) -> Iterator[Prometheus]:
    """Runs one on Griffin's rules.

    Args:
        where: a directory for its files.
        jobs: host:port to scrape each second, by job.
    """
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES / "*.yml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]}
            for job, target in jobs.items()
        ],
    }
    (where / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    port = free_port()
    command = program("prometheus")
    assert command is not None
    with (where / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [
                command,
                f"--config.file={where / 'prometheus.yml'}",
                f"--storage.tsdb.path={where / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=log,
        )
        try:
            running = Prometheus(f"http://127.0.0.1:{port}")

            def up() -> bool:
                assert process.poll() is None, (where / "log").read_text(encoding="utf-8")
                with contextlib.suppress(OSError):
                    return len(running.query("up == 1")) == len(jobs)
                return False

            eventually(up, within_s=30)
            yield running
        finally:
            process.terminate()
            process.wait()
