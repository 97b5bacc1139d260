"""The predictor's metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from features.vectors import Vector

LATENCY_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class PredictMetrics:
    """Every metric of the predictor, in a registry of its own.

    spool_bytes, generation : asked when the metrics are read
    """

    def __init__(self, spool_bytes: Callable[[], int], generation: Callable[[], int | None]) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by HTTP status.", ("status",))
        self.rows = self._counter("rows", "Rows answered.")
        self.missing = self._counter("missing_rows", "Rows for which a view had no stored row, by view.", ("view",))
        self.stale = self._counter("stale_rows", "Rows for which a view's stored row was past its ttl.", ("view",))
        self.nan_scores = self._counter("nan_scores", "Scores that were not finite and were answered by the prior.")
        self.shadow_failures = self._counter(
            "shadow_failures", "Rows of which a challenger made no finite score, by version.", ("version",)
        )
        self.dropped = self._counter("dropped_rows", "Answered rows that a full spool did not take.")
        self.store_errors = self._counter("store_errors", "Batches answered without stored features.")
        self.latency = Histogram(
            "penstock_predict_latency_seconds",
            "From a request's head to its answer.",
            registry=self.registry,
            buckets=LATENCY_BUCKETS,
        )
        self._gauge("spool_bytes", "Bytes of predictions that Kafka has not acknowledged.", spool_bytes)
        self._gauge(
            "generation", "Generation of the serving state that is applied; -1: none.", lambda: _or(generation())
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"penstock_predict_{name}_total", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"penstock_predict_{name}", text, registry=self.registry).set_function(value)

    def answered(self, vectors: Sequence[Vector]) -> None:
        """Count a batch."""
        self.rows.inc(len(vectors))
        for vector in vectors:
            for view in vector.missing:
                self.missing.labels(view).inc()
            for view in vector.stale:
                self.stale.labels(view).inc()

    def replied(self, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(str(status)).inc()
        self.latency.observe(seconds)


def _or(generation: int | None) -> float:
    return -1 if generation is None else generation
