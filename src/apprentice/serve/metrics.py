"""The endpoint's numbers in Prometheus' text format: what the engine says of itself, and how the requests went.

One registry for each application, so that two in one process do not mix. Knows nothing of routes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from apprentice.serve.engine import Engine, Stats
from apprentice.serve.protocol import Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_LABELS = ["model", "replica"]
_GAUGES: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "running_requests": ("Requests that are being decoded.", lambda stats: stats.running),
    "queued_requests": ("Requests that wait for a place.", lambda stats: stats.queued),
    "kv_use_ratio": ("Share of the memory for keys and values in use.", lambda stats: stats.kv_use),
    "kv_reserved_ratio": ("Share of it that running requests may come to use.", lambda stats: stats.kv_reserved),
    "kv_tokens": ("Tokens that the memory for keys and values has room for.", lambda stats: stats.kv_tokens),
}
_COUNTERS: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "tokens": ("Tokens produced.", lambda stats: stats.tokens),
    "prompt_tokens": ("Prompt tokens accepted.", lambda stats: stats.prompt_tokens),
    "shared_prompt_tokens": ("Prompt tokens taken from another request's memory.", lambda stats: stats.shared_tokens),
}


class Metrics:
    """Counts for the models of `engines` (by name) and their adapters; `text` is what `/metrics` answers."""

    def __init__(self, engines: Mapping[str, Engine], replica: str = "") -> None:
        self._replica = replica
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngines(engines, replica))
        self._requests = Counter("apprentice_requests", "Requests by status.", [*_LABELS, "status"], registry=self._registry)
        self._seconds = self._histogram("request_seconds", "Whole requests.", _SECONDS)
        self._first = self._histogram("time_to_first_token_seconds", "Until the first token.", _SECONDS)
        self._each = self._histogram("time_per_token_seconds", "Per token after the first.", _TOKEN_SECONDS)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"apprentice_{name}", help, _LABELS, buckets=buckets, registry=self._registry)

    def ended(self, model: str, status: int, began: float, first: float | None, usage: Usage | None) -> None:
        """A request for `model` has ended; `began` and `first` (its first token) are times of `time.perf_counter`."""
        now = time.perf_counter()
        labels = {"model": model, "replica": self._replica}
        self._requests.labels(**labels, status=str(status)).inc()
        self._seconds.labels(**labels).observe(now - began)
        if first is not None:
            self._first.labels(**labels).observe(first - began)
            if usage is not None and usage.completion > 1:
                self._each.labels(**labels).observe((now - first) / (usage.completion - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfEngines:
    """Reads the engines' gauges at the moment they are asked for."""

    def __init__(self, engines: Mapping[str, Engine], replica: str) -> None:
        self._engines = engines
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        for name, (help, value) in _GAUGES.items():
            yield self._filled(GaugeMetricFamily(f"apprentice_{name}", help, labels=_LABELS), stats, value)
        for name, (help, value) in _COUNTERS.items():
            yield self._filled(CounterMetricFamily(f"apprentice_{name}", help, labels=_LABELS), stats, value)

    def _filled(self, family: Any, stats: Mapping[str, Stats], value: Callable[[Stats], float]) -> Metric:
        for model, each in stats.items():
            family.add_metric([model, self._replica], float(value(each)))
        filled: Metric = family
        return filled
