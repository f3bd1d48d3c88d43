"""Writes docs/reference/metrics.md from the registry of a server: `make reference`."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import MagicMock

from page_parts import table
from prometheus_client.metrics import MetricWrapperBase

from griffin_server.telemetry.metrics import Metrics

PAGE = Path(__file__).with_name("metrics.md")


def page() -> str:
    """The whole page."""
    parts = [
        "# Metrics",
        "This page is generated from the code (`make reference`), and a test keeps it fresh. A "
        "server shows these metrics at `/metrics` of its `--metrics-port`. Times are in seconds "
        "and sizes in bytes. No label holds the id of a session or of a request. "
        "[Monitoring](../operations/monitoring.md) says what to do with them.",
        table(("metric", "type", "labels", "meaning"), _rows()),
        "In queries a histogram has the endings `_bucket`, `_sum` and `_count`, and a summary "
        "`_sum` and `_count`. Rates of sums over rates of counts are means. A server in role "
        "prefill has the same metrics; those of sessions and completions stay at zero.",
    ]
    return "\n\n".join(parts) + "\n"


def _rows() -> list[tuple[str, ...]]:
    metrics = Metrics()
    metrics.watch(MagicMock())  # for the names of gauges, whose values an engine would give
    labels = {
        metric.describe()[0].name: metric._labelnames  # there is no public way to them
        for metric in vars(metrics).values()
        if isinstance(metric, MetricWrapperBase)
    }
    rows = []
    for family in metrics.registry.collect():
        names = family._labelnames if family.type == "gauge" else labels[family.name]
        ending = "_total" if family.type == "counter" else ""
        shown = ", ".join(f"`{name}`" for name in names)
        rows.append((f"`{family.name}{ending}`", family.type, shown, family.documentation))
    return rows


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}\n")
