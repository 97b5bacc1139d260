"""What the catalogue's metrics say of steps that ran, over HTTP."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from pipelines.broker import Message, clock_message
from pipelines.featurizer import Featurizer
from pipelines.joiner import Joiner
from pipelines.memory_store import MemoryStore
from pipelines.runner import CommitPolicy, Runner
from services import metrics
from services.settings import ROOT
from services.topics import create_topics
from tests.memory_broker import MemoryBroker
from tests.toy import use_case

MINUTE = 60_000
START = 1_000_000 * MINUTE


def order(i: int) -> Message:
    value = {"id": f"o{i}", "time": START + i * MINUTE, "shop": "s", "item": 1, "price": 2.0}
    value |= {"colour": "red"} if i == 1 else {}
    return Message("toy.ordered", json.dumps(value).encode(), timestamp=START + i * MINUTE)


def prediction(i: int) -> Message:
    at = START + i * MINUTE
    value = {"request_id": f"q{i}", "event_time": at, "entities": {"shop": "s", "item": 1}, "fields": {"price": 1.0}}
    value |= {"features": {"all_count": i}, "schema": "x", "feature_times": {}, "version": "1", "arm": "champion"}
    return Message("toy.predictions", json.dumps(value | {"score": 0.5}).encode(), f"q{i}".encode(), timestamp=at)


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Name, step and the other label -> value, as a scraper gets them."""
    port = metrics.serve(registry, "127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    samples = [s for f in families for s in f.samples]
    return {(s.name, s.labels["step"], *(v for n, v in s.labels.items() if n != "step")): s.value for s in samples}


def test_a_step_counts_once_per_commit_what_came_in_went_out_and_was_refused(tmp_path: Path) -> None:
    broker, counted = MemoryBroker(), metrics.StepMetrics()
    create_topics(broker, use_case)
    producer = broker.producer()
    returned = {"id": "r1", "time": START + 5 * MINUTE, "order": "q1", "why": "late"}
    producer.send([order(1), order(2), order(2), order(0), Message("toy.ordered", b"no JSON", timestamp=START)])
    producer.send([prediction(1), prediction(2), Message("toy.returned", json.dumps(returned).encode(), timestamp=0)])
    producer.send([Message("toy.returned", json.dumps(returned).encode(), timestamp=START + 5 * MINUTE)])
    marks = [clock_message(t, 0, START + 9 * MINUTE) for t in ("toy.ordered", "toy.returned", "toy.predictions")]
    producer.send(marks)
    producer.flush()
    store = MemoryStore(use_case)
    for make in (lambda _: Featurizer(use_case), lambda i: Joiner(use_case, i)):
        step = Runner(
            broker, use_case, make, str(tmp_path), store=store, policy=CommitPolicy(9), on_measured=counted.count
        )
        step.run(threading.Event(), once=True)
    seen = scrape(counted.registry)
    assert seen["penstock_step_records_in_total", "featurizer"] == 9  # with clock records and both returns
    assert seen["penstock_step_rejected_total", "featurizer", "duplicate"] == 1
    assert seen["penstock_step_rejected_total", "featurizer", "malformed"] == 1
    assert seen["penstock_step_rejected_total", "featurizer", "future"] == 1
    assert seen["penstock_step_late_total", "featurizer"] == 1
    assert seen["penstock_step_unknown_fields_total", "featurizer"] == 1
    assert seen["penstock_step_unknown_fields_total", "joiner"] == 0  # it reads only some of a prediction's fields
    assert seen["penstock_step_rows_written_total", "featurizer", "online"] > 0
    assert seen["penstock_step_freshness_seconds_count", "featurizer"] == 1
    assert seen["penstock_step_watermark_timestamp_seconds", "featurizer"] == (START + 9 * MINUTE) / 1000
    assert seen["penstock_step_records_out_total", "joiner", "examples"] == 1
    assert seen["penstock_step_held", "joiner", "predictions"] == 1
    assert seen["penstock_step_commit_seconds_count", "joiner"] == seen["penstock_step_batch_records_count", "joiner"]
    assert seen["penstock_step_snapshot_bytes", "joiner"] > 0


RULES = yaml.safe_load((ROOT / "services/prometheus/alerts.yml").read_text())["groups"][0]["rules"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_metrics_and_labels_that_there_are(rule: dict[str, Any]) -> None:
    made = (metrics.StepMetrics(), metrics.MonitorMetrics(), metrics.PredictMetrics())
    there = {n: metric for m in made for metric, names in m.registry._collector_to_names.items() for n in names}
    asked = re.findall(r"(penstock_\w+)(?:\{([^}]*)\})?", rule["expr"])
    assert asked
    for name, matchers in asked:
        assert name in there
        assert set(re.findall(r"(\w+)[=!]", matchers)) <= set(there[name]._labelnames)
    told = rule["annotations"]["summary"] + rule["annotations"]["runbook_url"]
    anchor = rule["alert"].lower()
    assert rule["annotations"]["runbook_url"] == f"OPERATIONS.md#{anchor}"
    assert f'<a id="{anchor}"></a>' in (ROOT / "OPERATIONS.md").read_text()
    assert set(re.findall(r"\$labels\.(\w+)", told)) <= set(there[asked[0][0]]._labelnames)
    assert rule["labels"]["severity"] in ("critical", "warning") and rule["for"]
