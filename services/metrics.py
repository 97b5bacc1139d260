"""The catalogue: every Prometheus metric of every process, by who counts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)

from features.errors import ConfigError
from features.vectors import Vector
from pipelines.runner import Measured

MEDIA_TYPE = CONTENT_TYPE_LATEST
LATENCY_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
COMMIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
FRESHNESS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BATCH_BUCKETS = (1, 10, 100, 1_000, 5_000, 10_000)


class _Catalogue:
    """Metrics named `penstock_<prefix>_...` in one registry."""

    prefix = ""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"penstock_{self.prefix}_{name}_total", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"penstock_{self.prefix}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"penstock_{self.prefix}_{name}", text, labels, buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return as_text(self.registry)


class StepMetrics(_Catalogue):
    """The steps of a process, counted once per commit. Lag is the monitor's, who knows it of a dead step, too."""

    prefix = "step"

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__(registry)
        self.records_in = self._counter("records_in", "Records read.", "step")
        self.records_out = self._counter("records_out", "Records written, by topic.", "step", "topic")
        self.rejected = self._counter("rejected", "Records refused, by reason; duplicates too.", "step", "reason")
        self.late = self._counter("late", "Events that came late and still counted.", "step")
        self.unknown = self._counter("unknown_fields", "Events with fields that no contract has: ignored.", "step")
        self.rows = self._counter("rows_written", "Rows written to a store.", "step", "store")
        self.commits = self._histogram("commit_seconds", "How long a commit takes.", COMMIT_BUCKETS, "step")
        self.batch = self._histogram("batch_records", "Records of a commit.", BATCH_BUCKETS, "step")
        self.freshness = self._histogram(
            "freshness_seconds", "From a batch's oldest record sent to its rows online.", FRESHNESS_BUCKETS, "step"
        )
        self.snapshot = self._gauge("snapshot_bytes", "Base and deltas of the newest snapshot.", "step")
        self.watermark = self._gauge("watermark_timestamp_seconds", "Event time that is complete.", "step")
        self.committed = self._gauge("commit_timestamp_seconds", "When the newest commit was done.", "step")
        self.held = self._gauge("held", "What a step holds and waits with.", "step", "what")

    def count(self, done: Measured) -> None:
        """Count a commit."""
        step = done.step
        self.records_in.labels(step).inc(done.records)
        for topic, sent in done.messages.items():
            self.records_out.labels(step, topic).inc(sent)
        for reason, refused in done.rejected.items():
            self.rejected.labels(step, reason).inc(refused)
        self.late.labels(step).inc(done.late)
        self.unknown.labels(step).inc(done.unknown)
        for store, rows in done.rows.items():
            self.rows.labels(step, store).inc(rows)
        self.commits.labels(step).observe(done.seconds)
        self.batch.labels(step).observe(done.records)
        for seconds in done.freshness_s:
            self.freshness.labels(step).observe(seconds)
        self.snapshot.labels(step).set(done.snapshot_bytes)
        self.watermark.labels(step).set(done.watermark / 1000)
        self.committed.labels(step).set_to_current_time()
        for what, size in done.held.items():
            self.held.labels(step, what).set(size)


class MonitorMetrics(_Catalogue):
    """A use case as the control process sees it from outside."""

    prefix = "monitor"

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__(registry)
        self.lag = self._gauge("lag_records", "Records that a step has not committed.", "step")
        self.members = self._gauge("members", "Running instances of a step.", "step")
        self.watermark = self._gauge("watermark_timestamp_seconds", "Event time that a step has committed.", "step")
        self.reachable = self._gauge("reachable", "Whether a part answers.", "part")
        self.phase = self._gauge("rollout_phase", "1 for the phase of the trial that runs.", "phase")
        self.generation = self._gauge("rollout_generation", "Generation of the serving state.")
        self.decisions = self._gauge("rollout_decisions", "The newest 50 decisions by what they did.", "action")
        self.cut = self._gauge("retrain_cut_timestamp_seconds", "Event time up to which the newest retrain learned.")
        self.period = self._gauge("retrain_period_seconds", "Event time between two retrains.")
        self.learned = self._gauge("learner_examples", "Examples in the champion's refreshes.", "outcome")
        self.label_time = self._gauge("learner_label_timestamp_seconds", "Newest label that the champion has learned.")
        self.loss = self._gauge("served_log_loss", "Of the newest days, by role and the predecessor's last.", "role")
        self.disk = self._gauge("disk_free_ratio", "Free share of the disk that holds PENSTOCK_HOME.")

    def show(self, status: Mapping[str, Any], period_s: float, loss: Mapping[str, float], disk_free: float) -> None:
        """Take over a status."""
        self.period.set(period_s)
        self.disk.set(disk_free)
        for part, there in status["reachable"].items():
            self.reachable.labels(part).set(there)
        for role, value in loss.items():
            self.loss.labels(role).set(value)
        if "problem" in status:
            return
        for name, step in status["steps"].items():
            self.lag.labels(name).set(step["lag"])
            self.members.labels(name).set(step["members"])
            self.watermark.labels(name).set((step["watermark"] or 0) / 1000)
        self._rollout(status["serving"])
        if learner := status["learner"]:
            for outcome in ("learned", "skipped"):
                self.learned.labels(outcome).set(learner[outcome])
            self.label_time.set(learner["latest_label_time"] / 1000)

    def _rollout(self, serving: Mapping[str, Any]) -> None:
        self.generation.set(serving["generation"])
        for phase in ("shadow", "canary"):
            self.phase.labels(phase).set(serving.get("phase") == phase)
        done = [d["action"] for d in serving["decisions"]]
        for action in dict.fromkeys(done):
            self.decisions.labels(action).set(done.count(action))
        if cuts := [d["cut"] for d in serving["decisions"] if d["cut"]]:
            self.cut.set(max(cuts) / 1000)


class PredictMetrics(_Catalogue):
    """The predictor.

    spool_bytes, spool_limit, generation : asked when the metrics are read
    """

    prefix = "predict"

    def __init__(
        self,
        spool_bytes: Callable[[], int] = lambda: 0,
        generation: Callable[[], int | None] = lambda: None,
        spool_limit: int = 0,
    ) -> None:
        super().__init__()
        self.requests = self._counter("requests", "Requests by HTTP status.", "status")
        self.rows = self._counter("rows", "Rows answered.")
        self.missing = self._counter("missing_rows", "Rows for which a view had no stored row, by view.", "view")
        self.stale = self._counter("stale_rows", "Rows for which a view's stored row was past its ttl.", "view")
        self.nan_scores = self._counter("nan_scores", "Scores that were not finite and were answered by the prior.")
        self.shadow_failures = self._counter(
            "shadow_failures", "Rows of which a challenger made no finite score, by version.", "version"
        )
        self.dropped = self._counter("dropped_rows", "Answered rows that a full spool did not take.")
        self.store_errors = self._counter("store_errors", "Batches answered without stored features.")
        self.latency = self._histogram("latency_seconds", "From a request's head to its answer.", LATENCY_BUCKETS)
        self._gauge("spool_bytes", "Bytes of predictions that Kafka has not acknowledged.").set_function(spool_bytes)
        self._gauge("spool_limit_bytes", "What the spool may hold.").set(spool_limit)
        self._gauge("generation", "Generation of the serving state that is applied; -1: none.").set_function(
            lambda: _or(generation())
        )

    def answered(self, vectors: Sequence[Vector]) -> None:
        """Count a batch."""
        self.rows.inc(len(vectors))
        for vector in vectors:
            for view in vector.missing:
                self.missing.labels(view).inc()
            for view in vector.stale:
                self.stale.labels(view).inc()

    def unscored(self, version: str, rows: int, is_champion: bool) -> None:
        """Count rows that a model has no score for."""
        if is_champion:
            self.nan_scores.inc(rows)
        else:
            self.shadow_failures.labels(version).inc(rows)

    def replied(self, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(str(status)).inc()
        self.latency.observe(seconds)


def _or(generation: int | None) -> float:
    return -1 if generation is None else generation


def as_text(registry: Any) -> bytes:
    """A registry's metrics as Prometheus reads them."""
    return generate_latest(registry)


def serve(registry: CollectorRegistry, host: str, port: int) -> int:
    """Serve a registry on a thread of its own; returns the port (0: any). ConfigError when it is taken."""
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"metrics can't be served on {host}:{port} ({error.strerror}): set metrics_port") from None
    return int(server.server_port)
