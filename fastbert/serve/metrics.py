"""The counters of a server, for Prometheus; with several processes, all of them together (PROMETHEUS_MULTIPROC_DIR)."""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastbert.serve.batcher import Batch

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fastbert_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.latency = Histogram(
            "fastbert_request_seconds",
            "Time from a request to its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        lives: dict[str, Any] = {"registry": registry, "multiprocess_mode": "livesum"}
        self.in_flight = Gauge("fastbert_requests_in_flight", "Requests that are being answered", **lives)
        self.tokens = Counter("fastbert_tokens", "Tokens that were run", ["model"], registry=registry)
        self.batches = Counter("fastbert_batches", "Batches that were run", ["model"], registry=registry)
        self.fill = Histogram(
            "fastbert_batch_fill",
            "Share of a batch's budget of tokens that was used",
            ["model"],
            buckets=[i / 10 for i in range(1, 11)],
            registry=registry,
        )
        self.waited = Histogram(
            "fastbert_queue_seconds",
            "Time that the text of a batch had waited which waited longest",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue = Gauge("fastbert_queue_tokens", "Tokens that wait", ["model"], **lives)

    def told(self, model: str, batch: Batch) -> None:
        """Counts a batch."""
        self.tokens.labels(model).inc(batch.tokens)
        self.batches.labels(model).inc()
        self.fill.labels(model).observe(min(1.0, batch.tokens / batch.budget))
        self.waited.labels(model).observe(batch.waited)

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            return generate_latest(self.registry)
        from prometheus_client.multiprocess import MultiProcessCollector

        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)
