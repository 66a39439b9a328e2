"""Prometheus metrics of the endpoint, exported through Ray: the engines' gauges and counters, and statuses and times of requests.

Prometheus finds them at each node's port for Ray's metrics, with `ray_` before their names, tagged with the model and, by Ray
Serve, with application, deployment and replica. A route of ours would show only the one replica that a request happens to reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve import metrics

from apprentice.serve.api.schemas.responses import Usage
from apprentice.serve.engines.base import Engine, EngineStats

SAMPLE_S = 5.0  # seconds between two samples of the engines
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0]
_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "apprentice_running_requests": ("Requests that are being decoded.", lambda stats: stats.running),
    "apprentice_queued_requests": ("Requests that wait for a place.", lambda stats: stats.queued),
    "apprentice_kv_use_ratio": ("Share of the memory for keys and values in use.", lambda stats: stats.kv_use),
    "apprentice_kv_reserved_ratio": ("Share of it that running requests may come to use.", lambda stats: stats.kv_reserved),
    "apprentice_kv_tokens": ("Tokens that the memory for keys and values has room for.", lambda stats: stats.kv_tokens),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], int]]] = {
    "apprentice_tokens": ("Tokens produced.", lambda stats: stats.tokens),
    "apprentice_prompt_tokens": ("Prompt tokens accepted.", lambda stats: stats.prompt_tokens),
    "apprentice_shared_prompt_tokens": ("Prompt tokens taken from another request's memory.", lambda stats: stats.shared_tokens),
}
_REQUESTS = "apprentice_requests"
_REQUEST_TAGS: Any = ("model", "status")  # Ray's annotation allows one tag only
_HISTOGRAMS = {
    "apprentice_request_seconds": ("Requests that were answered to their end.", _SECONDS),
    "apprentice_time_to_first_token_seconds": ("Until the first token.", _SECONDS),
    "apprentice_time_per_token_seconds": ("Per token after the first.", _TOKEN_SECONDS),
}


def exported_names() -> set[str]:
    """Names of the series in Prometheus: `ray_apprentice_requests_total`, `ray_apprentice_request_seconds_bucket`, …"""
    counters = {f"{name}_total" for name in (*_COUNTERS, _REQUESTS)}
    histograms = {f"{name}_{part}" for name in _HISTOGRAMS for part in ("bucket", "count", "sum")}
    return {f"ray_{name}" for name in {*_GAUGES, *counters, *histograms}}


class RequestMetrics:
    """Metrics of the models of `engines` (by name) and their adapters."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._gauges = {name: metrics.Gauge(name, help, ("model",)) for name, (help, _) in _GAUGES.items()}
        self._counters = {name: metrics.Counter(name, help, ("model",)) for name, (help, _) in _COUNTERS.items()}
        self._requests = metrics.Counter(_REQUESTS, "Requests by status.", _REQUEST_TAGS)
        histograms = (metrics.Histogram(name, help, edges, ("model",)) for name, (help, edges) in _HISTOGRAMS.items())
        self._seconds, self._first, self._each = histograms
        self._counted: dict[tuple[str, str], int] = {}  # last value by (counter, model)

    def record_end(self, model: str, status: int, began_at: float, first_token_at: float | None, usage: Usage | None) -> None:
        """Records the end of a request for `model`; `began_at` and `first_token_at` are times of `time.perf_counter`.

        A request's duration is recorded for status 200 only: a refusal takes no time, and a client that leaves early says little.
        """
        now = time.perf_counter()
        self._requests.inc(tags={"model": model, "status": str(status)})
        tags = {"model": model}
        if status == 200:
            self._seconds.observe(now - began_at, tags)
        if first_token_at is not None:
            self._first.observe(first_token_at - began_at, tags)
            if usage is not None and usage.completion_tokens > 1:
                self._each.observe((now - first_token_at) / (usage.completion_tokens - 1), tags)

    def sample(self) -> None:
        """Sets the gauges to the engines' current values, and advances the counters to them."""
        for model, engine in self._engines.items():
            stats, tags = engine.stats(), {"model": model}
            for name, (_, value) in _GAUGES.items():
                self._gauges[name].set(value(stats), tags)
            for name, (_, count) in _COUNTERS.items():
                if (new := count(stats) - self._counted.get((name, model), 0)) > 0:
                    self._counters[name].inc(new, tags)
                    self._counted[name, model] = count(stats)
