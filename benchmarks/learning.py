"""`penstock bench learning`: from a label's event to predictions by weights that have learned from it.

Flights are asked for and land a moment later, at a steady rate, all timed when they are sent. A version of untrained
weights serves first; the learner goes on from there.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil

from benchmarks.rig import process, quantile_ms, rig, say
from features.errors import UnavailableError
from features.flights import use_case
from features.inputs import encode
from features.vectors import Vectorizer
from pipelines.broker import Message
from pipelines.learning import REFRESH_KEY, Refresh
from services import ledger, rollout, stack, wiring
from services.airflow_env import child_env
from services.settings import Settings
from services.topic_reader import read_all

NAME = use_case.name
SERVICES = ("featurizer+joiner", "predictor", "control", "learner")
LANDS_S = 2.0  # after it was asked for
BATCH_S = 0.1
SETTLE_S = 180.0
MOMENTS_S = 6.0
HOUR = 3_600_000
encode_json = msgspec.json.Encoder().encode


def bench(seconds: int, rate: int, kills: int = 0) -> dict[str, Any]:
    """Labels at `rate` a second for `seconds`, and until the learner has been killed (-9) `kills` times."""
    with rig(use_case, [f"{name}-{NAME}" for name in SERVICES]) as settings:
        version = first_version(settings)
        before = registry(settings)
        say(f"version {version} serves; {rate} labels/s for {seconds} s, {kills} kills")
        load, killer = Load(settings, rate), Killer(settings, kills)
        load.run(seconds, killer.works)
        load.settle()
        checked = ledger.check(wiring.broker(settings), use_case) or {"ok": False, "detail": "nothing was learned"}
        figures = measured(settings, load, version) | {"learner_mb": memory_mb(settings)}
        after = registry(settings)
    return {
        "labels": len(load.labelled),
        **figures,
        "kills": kills - killer.left,
        "ledger": checked["detail"],
        "ledger_is_exact": checked["ok"],
        "registry_before": before,
        "registry_after": after,
    }


def first_version(settings: Settings) -> str:
    """Register untrained weights, promote them, and wait until they serve."""
    folder = settings.home / "first"
    with process([sys.executable, "-m", "benchmarks.learning", str(folder)], child_env(settings)) as child:
        if child.wait():
            raise UnavailableError("no version could be made; its messages are above")
    tags = {"cut": str(round(time.time() * 1000)), "latest_label_time": "0"}
    version = wiring.registry(settings).register(NAME, folder, {}, tags)
    rollout.send(settings, NAME, "promote", version, "a bench")
    until(lambda: httpx.get(f"{settings.predictor_url}/readyz").json()["champion"] == version, "the version to serve")
    return version


def make_version(folder: Path) -> None:
    """The files of a version of untrained weights, its normaliser fitted to empty vectors."""
    from pipelines import net
    from pipelines.job import Job

    job = Job((), use_case.inputs, "", 0, tuple(use_case.label.targets))
    recipe = job.recipe
    model = net.Net(job.inputs, len(job.targets), recipe.members, recipe.hidden, recipe.trees)
    vectorizer = Vectorizer(use_case)
    rows = [asked(i, 0) for i in range(64)]
    keys = [vectorizer.entity_keys(row["entities"], row["fields"]) for row in rows]
    vectors = [vectorizer.assemble(k, row["fields"], HOUR, {}).features for k, row in zip(keys, rows, strict=True)]
    inputs = encode(job.inputs, vectors)
    model.normalise(inputs)
    model.start_at(np.full((1, 1 + len(job.targets)), use_case.prior, np.float32))
    net.export(model, folder, job.declaration, inputs)


def trip(number: int) -> dict[str, Any]:
    return {
        "carrier": f"C{number % 16}",
        "flight": f"C{number % 900}",
        "origin": ("EWR", "JFK", "LGA")[number % 3],
        "dest": f"D{number % 60}",
        "tailnum": f"N{number % 400:03}",
    }


def asked(number: int, now: int) -> dict[str, Any]:
    """The request about a flight that leaves in an hour."""
    fields = {"sched_dep": now + HOUR, "sched_arr": now + 3 * HOUR, "distance": 500 + 10 * (number % 200)}
    return {"request_id": f"F{number}", "entities": trip(number), "fields": fields}


class Load:
    """Requests and landings at a steady rate.

    labelled : request id -> when its label was sent (epoch s)
    answers : when an answer came (epoch s), by which refresh; in order
    """

    def __init__(self, settings: Settings, rate: int) -> None:
        self.settings, self.rate, self.random = settings, rate, random.Random(0)
        self.topic = use_case.topic("arrived")
        self.labelled: dict[str, float] = {}
        self.answers: list[tuple[float, str, int]] = []
        self.number, self.landed = 0, 0
        self.producer = wiring.broker(settings).producer()
        self.client = httpx.Client(base_url=settings.predictor_url, timeout=30)

    def run(self, seconds: float, more: Callable[[], bool]) -> None:
        """Ask and land for so long, and while there is more to come."""
        began = time.monotonic()
        waiting: list[tuple[float, int]] = []
        while (now := time.monotonic()) < began + seconds or more():
            due = int((now - began) * self.rate) - self.number
            if due > 0:
                waiting.append((now + LANDS_S, self._ask(due)))
            while waiting and waiting[0][0] <= now:
                self._land(waiting.pop(0)[1])
            time.sleep(max(0.0, BATCH_S - (time.monotonic() - now)))
        for _, until_number in waiting:
            self._land(until_number)

    def settle(self) -> None:
        """Ask on until the learner has nothing more to learn from."""

        def done() -> bool:
            self._ask(1)
            newest = newest_refresh(self.settings)
            return newest is not None and newest.learned + newest.skipped >= len(self.labelled)

        until(done, "the last label to be learned")
        until(
            lambda: self._ask(1) > 0 and self.answers[-1][2] >= number(self.settings),
            "the last refresh to answer",
        )

    def _ask(self, count: int) -> int:
        now = round(time.time() * 1000)
        rows = [asked(self.number + i, now) for i in range(count)]
        reply = self.client.post("/predict", json={"rows": rows})
        reply.raise_for_status()
        answer = reply.json()["rows"][0]
        self.answers.append((time.time(), answer["version"], answer["refresh"]))
        self.number += count
        return self.number

    def _land(self, until_number: int) -> None:
        for number in range(self.landed, until_number):
            now = time.time()
            delay = self.random.randint(-20, 30) + 20 * (number % 16 < 4)
            body = {"id": f"F{number}/arrived", "time": round(now * 1000), "flight_id": f"F{number}", **trip(number)}
            body |= {"sched_arr": round(now * 1000), "dep_delay": delay, "arr_delay": delay}
            self.producer.send([Message(self.topic, encode_json(body), f"F{number}".encode())])
            self.labelled[f"F{number}"] = now
        self.producer.flush()
        self.landed = until_number


def newest_refresh(settings: Settings) -> Refresh | None:
    """The newest refresh record."""
    records = list(refreshes(settings))
    return records[-1] if records else None


def number(settings: Settings) -> int:
    """The newest refresh's number; 0 without any."""
    newest = newest_refresh(settings)
    return newest.number if newest else 0


def refreshes(settings: Settings) -> Iterator[Refresh]:
    broker = wiring.broker(settings)
    for record in read_all(broker, use_case.topic("models")):
        if record.value and (record.key or b"").startswith(REFRESH_KEY.encode()):
            yield msgspec.json.decode(record.value, type=Refresh)
    broker.close()


def measured(settings: Settings, load: Load, version: str) -> dict[str, Any]:
    """How long each label took to be in the weights that answered."""
    ends: list[tuple[int, int]] = []  # refresh number, offset up to which it has learned
    for refresh in refreshes(settings):
        if refresh.version == version and refresh.file:
            ends.append((refresh.number, max(s.offsets[0][1] for s in refresh.spans if not s.reason)))
    broker = wiring.broker(settings)
    offset_of = {row.value.request_id: row.offset for row in ledger.examples(broker, use_case)}
    broker.close()
    numbers, offsets = np.array([n for n, _ in ends]), np.array([end for _, end in ends])
    answered = [(at, number) for at, by, number in load.answers if by == version]
    at, by = np.array([a for a, _ in answered]), np.array([n for _, n in answered])
    waits, missing = [], 0
    for request, sent in load.labelled.items():
        place = int(np.searchsorted(offsets, offset_of.get(request, 1 << 62), side="right"))
        if place == len(numbers):
            missing += 1
            continue
        first = int(np.searchsorted(by, numbers[place]))
        waits.append(float(at[first]) - sent if first < len(by) else float("inf"))
    return {
        "refreshes": len(ends),
        "never_learned": missing,
        "label_to_serving_p50_ms": quantile_ms(waits, 0.5),
        "label_to_serving_p95_ms": quantile_ms(waits, 0.95),
        "label_to_serving_max_ms": quantile_ms(waits, 1),
    }


class Killer:
    """Kills the learner (-9), so many times: each time a random moment after its first refresh, training or not."""

    def __init__(self, settings: Settings, kills: int) -> None:
        self.settings, self.left, self.random = settings, kills, random.Random(1)
        self.number = 0
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while self.left:
            until(self._refreshed, "a refresh")
            time.sleep(self.random.uniform(0, MOMENTS_S))
            os.kill(stack.status(self.settings)["services"][f"learner-{NAME}"]["pid"], signal.SIGKILL)
            self.number, self.left = number(self.settings), self.left - 1
            say(f"killed after refresh {self.number}, {self.left} left")

    def _refreshed(self) -> bool:
        return number(self.settings) > self.number

    def works(self) -> bool:
        """Whether there are kills to come; false, too, when it gave up."""
        return self.thread.is_alive()


def memory_mb(settings: Settings) -> int:
    """Memory of the learner that is its own: libraries that are mapped from files left out."""
    pid = stack.status(settings)["services"][f"learner-{NAME}"]["pid"]
    return round(psutil.Process(pid).memory_full_info().uss / 1e6)


def registry(settings: Settings) -> dict[str, Any]:
    """Versions, MB of their files, and of what the learner keeps beside them."""

    def megabytes(folder: Path) -> float:
        return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 1)

    place = Path(settings.state_url, NAME, "learner")
    return {
        "versions": len(wiring.registry(settings).versions(NAME)),
        "registry_mb": megabytes(settings.home / "mlflow/artifacts"),
        "refresh_files_mb": megabytes(place / "0/refreshes"),
        "snapshots_mb": megabytes(place / "0/snapshots"),
    }


def until(reached: Any, what: str) -> None:
    """Poll with a deadline."""
    deadline = time.monotonic() + SETTLE_S
    while not reached():
        if time.monotonic() > deadline:
            raise UnavailableError(f"waited {SETTLE_S:.0f} s for {what}")
        time.sleep(BATCH_S)


if __name__ == "__main__":
    make_version(Path(sys.argv[1]))
