"""`penstock bench features`: the engine alone, Kafka to both stores, a fold in Quix Streams beside ours, scaling."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks import peers
from benchmarks.rig import CORE, DAY_MS, YEAR_MS, apart, measured, process, produce_flights, redis_client, rig, say
from features.errors import UnavailableError
from features.usecase import UseCase, load
from pipelines.checkpoint import listed_files, parse_metadata
from services import wiring
from services.airflow_env import child_env
from services.settings import ROOT, Settings

MODULE = [sys.executable, "-m"]
CASES = {  # hours of the window, keys
    "short": ("1", "1000"),
    "long": ("1440", "1000"),
    "many": ("1440", "1000000"),
    "texts": ("1440", "1000", "text"),
    "many_texts": ("1440", "1000000", "text"),
}


def bench(days: int) -> dict[str, Any]:
    """All figures; `days` of 2013 are measured."""
    use_case = load("flights")
    fold_python = peers.python("quixstreams")
    say(f"the engine alone, {days} days of flights, one core")
    engine = measured([*MODULE, "benchmarks.engine", "year", str(days)])
    with apart(), rig(use_case) as settings:
        say("the same events onto Kafka")
        sent = produce_flights(settings, use_case, days)
        say(f"Kafka to both stores: {sum(sent.values()):,} events")
        stores = kafka_to_stores(settings, use_case, sum(sent.values()))
        say(f"27 features from Kafka beside Quix Streams: {sent['departed']:,} events")
        fold = compare_folds(settings, use_case, fold_python, sent["departed"], YEAR_MS + days * DAY_MS)
    scaling = {}
    for name, case in CASES.items():
        say(f"scaling: a window of {case[0]} h, {' '.join([f'{int(case[1]):,}', *case[2:], 'keys'])}")
        scaling[name] = measured([*MODULE, "benchmarks.engine", *case])
    return {"days": days, **engine, **stores, **fold, **ratios(**scaling), "scaling": scaling}


def kafka_to_stores(settings: Settings, use_case: UseCase, events: int) -> dict[str, Any]:
    """`penstock run featurizer flights --once`, on one core, from the moment it owns its partition to its end."""
    client = redis_client(settings)
    command = [*MODULE, "services.cli", "run", "featurizer", use_case.name, "--once"]
    began = time.monotonic()
    with process(command, child_env(settings), CORE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        for line in child.stdout:
            if "partition owned" in line:
                began = time.monotonic()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    if child.returncode:
        raise UnavailableError(f"the featurizer ended with code {child.returncode}; its messages are above")
    commits, offline = outcome(settings, use_case)
    online = client.info("commandstats")["cmdstat_hset"]["calls"]
    return {
        "kafka_to_stores_events_per_s": round(events / seconds),
        "events_per_commit": round(events / commits),
        "online_rows_per_event": round(online / events, 2),
        "offline_rows_per_event": round(offline / events, 2),
        "featurizer_peak_mb": round(usage.ru_maxrss / 1024),
        "featurizer_cpu_us_per_event": round((usage.ru_utime + usage.ru_stime) / events * 1e6, 1),
    }


def outcome(settings: Settings, use_case: UseCase) -> tuple[int, int]:
    """The featurizer's commits, and the rows in the files they vouch for."""
    broker = wiring.broker(settings)
    positions = broker.committed(f"{use_case.name}.featurizer").values()
    commits = max(int(parse_metadata(p.metadata)[0].split("-")[0]) for p in positions)
    tables = [listed_files(settings.state_url, use_case.name, "featurizer", v.name, broker) for v in use_case.views]
    broker.close()
    return commits, sum(pq.read_metadata(f.removeprefix("file://")).num_rows for files in tables for f in files)


def compare_folds(settings: Settings, use_case: UseCase, python: str, events: int, end: int) -> dict[str, Any]:
    """Events/s of both on one core, and ours over theirs; UnavailableError when their values differ."""
    ours = measured([*MODULE, "benchmarks.fold"], settings)
    script, state = str(ROOT / "benchmarks/quixstreams_fold.py"), str(settings.home / "quixstreams")
    topic = use_case.topic("departed")
    theirs = measured([python, script, settings.kafka_bootstrap, topic, str(events), str(end), state], settings)
    compared = same_values(ours["values"], theirs["values"])
    return {
        "fold_events": events,
        "fold_events_per_s": round(events / ours["seconds"]),
        "quixstreams_fold_events_per_s": round(events / theirs["seconds"]),
        "quixstreams_fold_ratio": round(theirs["seconds"] / ours["seconds"], 2),
        "quixstreams_fold_cpu_ratio": round(theirs["cpu_seconds"] / ours["cpu_seconds"], 2),
        "fold_values_compared": compared,
    }


def same_values(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """How many values both have alike; UnavailableError naming the first key where they differ."""
    compared = 0
    for grouping, keys in theirs.items():
        for key, values in keys.items():
            mine = ours[grouping].get(key)
            if mine is None or not all(map(alike, mine, values)):
                raise UnavailableError(f"the folds differ at {grouping} {key}: ours {mine}, Quix Streams {values}")
            compared += len(values)
    return compared


def alike(a: float | None, b: float | None) -> bool:
    """Equal, or both null."""
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9)


def ratios(
    short: dict[str, Any], long: dict[str, Any], many: dict[str, Any], texts: dict[str, Any], many_texts: dict[str, Any]
) -> dict[str, Any]:
    """How cost and memory grow. The two memory figures solve state = keys * a + tiles * b for two of the runs."""
    held = np.array([[case["live_keys"], case["tiles"]] for case in (long, many)])
    per_key, per_tile = np.linalg.solve(held, [long["state_mb"] * 1e6, many["state_mb"] * 1e6])
    return {
        "window_cost_ratio": round(long["us_per_event"] / short["us_per_event"], 2),
        "keys_cost_ratio": round(many["us_per_event"] / long["us_per_event"], 2),
        "text_keys_cost_ratio": round(many_texts["us_per_event"] / texts["us_per_event"], 2),
        "history_cost_ratio": round(short["us_last_tenth"] / short["us_first_tenth"], 2),
        "bytes_per_key": round(per_key),
        "bytes_per_tile": round(per_tile),
    }
