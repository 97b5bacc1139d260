"""`penstock bench freshness`: from an event's send to its value in Feast's online store, under load.

The load is departures and arrivals of a few hundred aircraft, each event timed when it is sent. Every 20 ms one of them
is a probe: a departure of an aircraft of its own, whose newest departure time is a feature, so that one read tells
which probes are readable. Redis tells of writes to that aircraft's key, so nothing polls.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.rig import process, quantile_ms, redis_client, rig, say
from features.errors import UnavailableError
from features.flights import tailnum, use_case
from pipelines.broker import Message
from pipelines.feature_store import FeatureStore, repo_config
from services import wiring
from services.airflow_env import child_env
from services.settings import Settings

PROBE, FEATURE = "PROBE", "tail_dep_time_last_24h"
PROBE_EVERY_S = 0.02
AIRCRAFT = [f"N{i:03}" for i in range(400)]
SETTLE_S, DEADLINE_S = 5, 60.0  # load before the measurement; how long a value may take to appear
FLUSH_EVERY = 500  # events; acknowledgements are checked then
SCAN_S = 0.05

tail_dep = next(view for view in use_case.views if view.name == "tail_dep")
encode = msgspec.json.Encoder().encode


def bench(seconds: int, rate: int) -> dict[str, Any]:
    """Quantiles of the probes' times over `seconds` at `rate` events a second."""
    with rig(use_case) as settings:
        store = wiring.feature_store(settings, use_case)
        with featurizer(settings), watching(settings, store) as watch:
            source = Source(settings, watch)
            source.wait_for_the_first()
            say(f"{rate} events/s for {seconds} s")
            source.run(rate, SETTLE_S)
            watch.clear()
            with commits(settings) as committed:
                sent_per_s = source.run(rate, seconds)
            missing = watch.wait()
        compared = feast_reads_alike(settings, store)
        store.close()
    gaps = [later - earlier for earlier, later in pairwise(committed)]
    return {
        "events_per_s": round(sent_per_s),
        "probes": len(watch.seconds) + missing,
        "never_appeared": missing,
        "online_p50_ms": quantile_ms(watch.seconds, 0.5),
        "online_p95_ms": quantile_ms(watch.seconds, 0.95),
        "online_p99_ms": quantile_ms(watch.seconds, 0.99),
        "online_max_ms": quantile_ms(watch.seconds, 1),
        "commits_per_s": round(len(committed) / seconds, 1),
        "commit_gap_p99_ms": quantile_ms(gaps, 0.99),
        "values_read_alike_by_feast": compared,
    }


@contextmanager
def featurizer(settings: Settings) -> Iterator[None]:
    """`penstock run featurizer flights` for the time of the block."""
    command = [sys.executable, "-m", "services.cli", "run", "featurizer", "flights"]
    with process(command, child_env(settings), stdout=sys.stderr):
        yield


class Watch:
    """Probes that are on their way, and how long the others took (s)."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.waiting: deque[tuple[int, float]] = deque()
        self.seconds: list[float] = []

    def clear(self) -> None:
        """Forget what was measured, and count only probes sent from now on."""
        self.seconds = []
        self.waiting.clear()

    def look(self) -> None:
        """Read the probe's row; every probe up to its time is readable now."""
        row = self.store.read([{"tailnum": PROBE}])[0][tail_dep.name][0]
        now = time.monotonic()
        while row and self.waiting and self.waiting[0][0] <= row[FEATURE]:
            self.seconds.append(now - self.waiting.popleft()[1])

    def wait(self) -> int:
        """Wait for the last probes; returns how many don't appear by the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while self.waiting and time.monotonic() < deadline:
            time.sleep(SCAN_S)
        return len(self.waiting)


@contextmanager
def watching(settings: Settings, store: FeatureStore) -> Iterator[Watch]:
    """A watch that looks each time Redis tells of a write to the probe's key."""
    client, watch = redis_client(settings), Watch(store)
    client.config_set("notify-keyspace-events", "Kh")  # K: by key, h: commands on hashes
    with client.pubsub(ignore_subscribe_messages=True) as told:
        told.psubscribe(**{f"*{PROBE}*": lambda _: watch.look()})
        thread = told.run_in_thread(sleep_time=1.0, daemon=True)
        try:
            yield watch
        finally:
            thread.stop()
            thread.join()
    client.close()


class Source:
    """Produces the load and the probes among it."""

    def __init__(self, settings: Settings, watch: Watch) -> None:
        self.producer, self.watch, self.random = wiring.broker(settings).producer(), watch, random.Random(0)
        self.topics = {contract.name: topic for topic, contract in use_case.event_topics.items()}
        self.sent = 0

    def run(self, rate: int, seconds: int) -> float:
        """Send `rate` events a second, evenly; returns the rate reached."""
        began, count = time.monotonic(), 0
        probe_every = max(1, round(rate * PROBE_EVERY_S))
        while count < rate * seconds:
            while count < min(rate * seconds, (time.monotonic() - began) * rate):
                self.send(PROBE if count % probe_every == 0 else self.random.choice(AIRCRAFT))
                count += 1
            time.sleep(max(0.0, began + count / rate - time.monotonic()))
        self.producer.flush()
        return count / (time.monotonic() - began)

    def send(self, aircraft: str) -> None:
        """One event of an aircraft, departures of the probe's, both kinds of the others."""
        self.sent += 1
        now = round(time.time() * 1000)
        name = "departed" if aircraft == PROBE or self.sent % 2 else "arrived"
        message = Message(self.topics[name], encode(self.event(name, aircraft, now)), aircraft.encode(), timestamp=now)
        if aircraft == PROBE:
            self.watch.waiting.append((now, time.monotonic()))
        self.producer.send([message])
        if self.sent % FLUSH_EVERY == 0:
            self.producer.flush()

    def event(self, name: str, aircraft: str, now: int) -> dict[str, Any]:
        """The fields of the event's contract."""
        number, delay = int(aircraft[1:]) if aircraft != PROBE else 0, self.random.randint(-10, 60)
        about = {"id": f"{self.sent}/{name}", "time": now, "flight_id": f"F{self.sent}", "tailnum": aircraft}
        about |= {"carrier": f"C{number % 16}", "flight": f"C{number}", "origin": ("EWR", "JFK", "LGA")[number % 3]}
        when = {"sched_dep": now} if name == "departed" else {"sched_arr": now, "arr_delay": delay}
        return about | {"dest": f"D{number % 60}", "dep_delay": delay} | when

    def wait_for_the_first(self) -> None:
        """Send probes until one is readable: the featurizer works."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.watch.seconds:
            if time.monotonic() > deadline:
                raise UnavailableError(f"no event is readable after {DEADLINE_S:.0f} s; the featurizer's log is above")
            self.run(100, 1)


@contextmanager
def commits(settings: Settings) -> Iterator[list[float]]:
    """The instants (s) at which the featurizer writes its snapshots during the block, in order afterwards."""
    folder = Path(settings.state_url, use_case.name, "featurizer/0/snapshots")
    began, stop, instants = time.time(), threading.Event(), {}
    found: list[float] = []

    def scan() -> None:
        while not stop.wait(SCAN_S):
            for path in folder.iterdir():
                with suppress(FileNotFoundError):  # a newer base has made it useless
                    instants[path.name.split("-")[0]] = path.stat().st_mtime

    thread = threading.Thread(target=scan)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
    found += sorted(at for at in instants.values() if at >= began)


def feast_reads_alike(settings: Settings, store: FeatureStore) -> int:
    """How many values Feast's own client reads as ours does; UnavailableError naming a row that differs."""
    from feast import FeatureStore as Feast

    keys = [{"tailnum": number} for number in (PROBE, *AIRCRAFT)]
    feast = Feast(config=repo_config(settings.redis, str(settings.home / "registry.db")))
    feast.apply([tailnum, tail_dep])
    names = [field.name for field in tail_dep.features]
    theirs = feast.get_online_features([f"{tail_dep.name}:{name}" for name in names], keys).to_dict()
    for i, (key, ours) in enumerate(zip(keys, store.read(keys), strict=True)):
        row = ours[tail_dep.name][0] or dict.fromkeys(names)
        if row != (read := {name: theirs[name][i] for name in names}):
            raise UnavailableError(f"Feast's client reads {key} as {read}, ours as {row}")
    return len(keys) * len(names)
