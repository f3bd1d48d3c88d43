"""Gauges that are read from the engine at each scrape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from griffin_core.errors import EngineStopped

if TYPE_CHECKING:  # it imports torch, and the server listens before that
    from griffin_core.engine.engine import Engine

SCRAPE_S = 5.0
"""Seconds that a scrape waits for a busy engine. Without its answer the gauges are left out."""


class EngineGauges(Collector):
    """Gauges of an engine's sessions and memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # so that registering does not ask the engine, which has not started

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            usage = self._engine.usage().result(SCRAPE_S)
        except (EngineStopped, TimeoutError):
            return
        sessions = GaugeMetricFamily("griffin_sessions", "Sessions by state.", labels=("state",))
        for state, count in usage.sessions.items():
            sessions.add_metric((state.value,), count)
        yield sessions
        for name, help, value in (
            ("slim_view_bytes", "Bytes of all slim views.", usage.slim_view_bytes),
            ("kv_cache_bytes", "Bytes of all sessions' KV caches.", usage.kv_cache_bytes),
            (
                "session_bytes_limit",
                "The most bytes that slim views and KV caches may use together.",
                usage.limit_bytes,
            ),
        ):
            yield GaugeMetricFamily(f"griffin_{name}", help, value=value)
