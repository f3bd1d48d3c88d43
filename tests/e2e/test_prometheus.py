"""Rules and dashboards on a real Prometheus that scrapes real servers under load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.prometheus import ROOT, RULES, Prometheus, program, prometheus
from tests.servers import Process, eventually, free_port

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        program("prometheus") is None,
        reason="no prometheus: make puts Debian's into .venv where there is apt-get",
    ),
]

DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
QUERIES = [
    (path.stem, panel["title"], target["expr"])
    for path in DASHBOARDS
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
    for target in panel.get("targets", [])
]


def test_promtool_finds_nothing_wrong_and_alerts_fire_when_they_should() -> None:
    for arguments in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "rules/griffin.yml"],
        ["test", "rules", "rules_test.yml"],
    ):
        done = subprocess.run(
            [str(program("promtool")), *arguments],
            cwd=RULES.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


MEDIAN = (
    "histogram_quantile(0.5, sum by (le) (griffin_inter_token_latency_seconds_bucket{{{labels}}}))"
)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Servers under load, Prometheus beside them, and what `griffin bench` said of each load."""

    prometheus: Prometheus
    whole: dict[str, Any]
    late: dict[str, Any]


def bench(target: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "griffin_server", "bench", "--target", target, "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


@pytest.fixture(scope="module")
def watched(
    tiny_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    model = ("--model", str(tiny_directory("llama-long")), "--dtype", "float32")
    decode_port, prefill_port = free_port(), free_port()
    with Process("--role", "prefill", "--metrics-port", str(prefill_port), *model) as prefill:
        source = ("--role", "decode", "--prefill-target", prefill.target())
        with Process(*source, "--metrics-port", str(decode_port), *model) as decode:
            jobs = {
                "griffin-prefill": f"127.0.0.1:{prefill_port}",
                "griffin-decode": f"127.0.0.1:{decode_port}",
            }
            with prometheus(tmp_path_factory.mktemp("prometheus"), jobs) as running:
                some = ("--prompt-tokens", "40:200", "--output-tokens", "60:120")
                target, half = decode.target(), ("--density", "0.5")
                whole = bench(target, "--requests", "24", "--concurrency", "4", *half, *some)
                eventually(lambda: running.value("sum(griffin_requests_total)") == 24, within_s=20)
                whole["counted_tokens"] = running.value("sum(griffin_generated_tokens_total)")
                whole["histogram_p50"] = running.value(MEDIAN.format(labels=""))
                # Late, but each with a first token, on a busy machine too.
                endless = ("--output-tokens", "3500", "--timeout", "1.5")
                late = bench(target, "--requests", "6", "--concurrency", "2", *endless)
                yield Watched(prometheus=running, whole=whole, late=late)


def test_counters_say_what_the_load_counted(watched: Watched) -> None:
    whole, late, value = watched.whole, watched.late, watched.prometheus.value
    assert whole["completed"] == 24 and whole["errors"] == {}
    assert late["completed"] == 0 and late["errors"] == {"DEADLINE_EXCEEDED": 6}
    eventually(lambda: value("sum(griffin_requests_total)") == 30, within_s=20)
    assert value('griffin_requests_total{code="OK",finish_reason="MAX_TOKENS"}') == 24
    assert value('griffin_requests_total{code="DEADLINE_EXCEEDED"}') == 6
    assert value('sum(griffin_aborts_total{origin="deadline"})') == 6
    assert value("sum(griffin_aborts_total)") == 6
    assert value("sum(griffin_rejections_total)") == 0
    assert whole["counted_tokens"] == whole["generated_tokens"]
    prompts = whole["prompt_tokens"] + late["prompt_tokens"]
    assert value("sum(griffin_prompt_tokens_total)") == prompts
    # Of those that ended late, some tokens may have been on their way.
    sent = value("sum(griffin_generated_tokens_total)")
    assert sent is not None
    received = whole["generated_tokens"] + late["generated_tokens"]
    assert received <= sent <= received + 6 * 64
    assert value("sum(griffin_time_to_first_token_seconds_count)") == 30
    assert value('griffin_prefill_seconds_count{job="griffin-prefill"}') == 30


def test_the_median_between_tokens_is_what_the_load_measured(watched: Watched) -> None:
    measured = watched.whole["inter_token_latency_s"]["p50"]
    assert watched.whole["histogram_p50"] == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_half_the_neurons_show_apart_from_all_of_them(tmp_path: Path) -> None:
    """On SmolLM2: a server for each density, and each run as `griffin bench` measured it."""
    runs = {"dense": "1.0", "half": "0.5"}
    ports = {job: free_port() for job in runs}
    with ExitStack() as started:
        servers = {
            job: started.enter_context(Process("--metrics-port", str(port)))
            for job, port in ports.items()
        }
        jobs = {job: f"127.0.0.1:{port}" for job, port in ports.items()}
        watching = started.enter_context(prometheus(tmp_path, jobs))
        seconds = {}
        for job, density in runs.items():
            load = ("--requests", "6", "--concurrency", "1", "--output-tokens", "200:200")
            run = bench(servers[job].target(), *load, "--density", density)
            done = f'griffin_requests_total{{job="{job}",code="OK"}}'
            eventually(lambda done=done: watching.value(done) == 6, within_s=20)
            shown = watching.value(MEDIAN.format(labels=f'job="{job}"'))
            measured = run["inter_token_latency_s"]["p50"]
            assert shown == pytest.approx(measured, rel=0.1)
            seconds[job] = measured, shown
            print(f"{job}: bench {1e3 * measured:.2f} ms, histogram {1e3 * shown:.2f} ms")
    (dense, dense_shown), (half, half_shown) = seconds["dense"], seconds["half"]
    assert (half_shown < dense_shown) == (half < dense)


@pytest.mark.parametrize(("dashboard", "panel", "expression"), QUERIES)
def test_every_query_of_every_dashboard_returns_data(
    watched: Watched, dashboard: str, panel: str, expression: str
) -> None:
    watched_for = expression.replace("$__rate_interval", "1m")
    eventually(lambda: bool(watched.prometheus.query(watched_for)), within_s=20)


def test_every_rule_evaluates_and_what_it_looks_at_is_there(watched: Watched) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = watched.prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    eventually(lambda: all(rule["health"] == "ok" for rule in rules()), within_s=30)
    assert len(rules()) == 16
    for rule in rules():
        assert not rule.get("lastError")
        # An alert's comparison is empty as long as all is well; what it compares is not.
        looked_at = re.split(r"\s(?:==|<|>)\s", rule["query"])[0]
        name = rule.get("name")
        eventually(lambda at=looked_at: bool(watched.prometheus.query(at)), within_s=20)
        if rule["type"] == "alerting":
            # On a busy machine first tokens are slow for a moment; it fires after ten minutes.
            slow = ["pending"] if name == "GriffinSlowFirstToken" else []
            assert rule["state"] in ["inactive", *slow], name
