"""The endpoint's numbers in Prometheus' text format: what the engine says of itself, and how the requests went.

One registry for each application, so that two in one process do not mix. Knows nothing of routes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from apprentice.serve.engine import Engine
from apprentice.serve.protocol import Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counts for `model`; `text` is what `/metrics` answers."""

    def __init__(self, engine: Engine, model: str, replica: str = "") -> None:
        self._labels = {"model": model, "replica": replica}
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine, self._labels))
        names = list(self._labels)
        self._requests = Counter("apprentice_requests", "Requests by status.", [*names, "status"], registry=self._registry)
        self._seconds = Histogram("apprentice_request_seconds", "Whole requests.", names, buckets=_SECONDS, registry=self._registry)
        self._first = Histogram(
            "apprentice_time_to_first_token_seconds", "Until the first token.", names, buckets=_SECONDS, registry=self._registry
        )
        self._each = Histogram(
            "apprentice_time_per_token_seconds",
            "Per token after the first.",
            names,
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )

    def ended(self, status: int, began: float, first: float | None, usage: Usage | None) -> None:
        """One request has ended; `began` and `first` (its first token) are times of `time.perf_counter`."""
        now = time.perf_counter()
        self._requests.labels(**self._labels, status=str(status)).inc()
        self._seconds.labels(**self._labels).observe(now - began)
        if first is not None:
            self._first.labels(**self._labels).observe(first - began)
            if usage is not None and usage.completion > 1:
                self._each.labels(**self._labels).observe((now - first) / (usage.completion - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfEngine:
    """Reads the engine's gauges at the moment they are asked for."""

    def __init__(self, engine: Engine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            "running_requests": ("Requests that are being decoded.", stats.running),
            "queued_requests": ("Requests that wait for a place.", stats.queued),
            "kv_use_ratio": ("Share of the memory for keys and values in use.", stats.kv_use),
        }
        counters = {
            "tokens": ("Tokens produced.", stats.tokens),
            "prompt_tokens": ("Prompt tokens accepted.", stats.prompt_tokens),
            "shared_prompt_tokens": ("Prompt tokens taken from another request's memory.", stats.shared_tokens),
        }
        for name, (help, value) in gauges.items():
            gauge = GaugeMetricFamily(f"apprentice_{name}", help, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), float(value))
            yield gauge
        for name, (help, value) in counters.items():
            counter = CounterMetricFamily(f"apprentice_{name}", help, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), float(value))
            yield counter
