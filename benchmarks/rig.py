"""What the benches share: an embedded stack of their own, child processes that end with them, events on Kafka."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redis import Redis

from features.errors import ConfigError, UnavailableError
from features.usecase import UseCase
from pipelines.broker import Message, clock_message
from services import stack, timetable, wiring
from services.airflow_env import child_env
from services.processes import die_with_parent
from services.settings import PORTS, ROOT, Settings
from services.setup.install import cache
from services.topics import topics

DAY_MS = 86_400_000
YEAR_MS = 1_356_998_400_000  # 2013-01-01T00:00Z, a boundary of every slide and file
OWN = ("kafka_bootstrap", "redis", "state_url")
BEGAN = time.monotonic()
CORES = os.sched_getaffinity(0)
CORE = max(CORES)
"""What is measured runs on it; within `apart` what it talks to has the others."""


def say(line: str) -> None:
    """A line of progress on standard error."""
    print(f"[bench {time.monotonic() - BEGAN:6.1f} s] {line}", file=sys.stderr, flush=True)


@contextmanager
def rig(use_case: UseCase, services: Sequence[str] = ("kafka", "redis")) -> Iterator[Settings]:
    """These services, and what they need, with the use case's topics, empty, in a folder that is gone afterwards.

    Raises
    ------
    ConfigError : the configuration names a Kafka, a Redis or a state folder, which a bench would fill
    """
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as home:
        base = _free_base(Settings.load().port_base)
        place = {"PENSTOCK_HOME": home, "PENSTOCK_PORT_BASE": str(base)}
        settings = stack.prepared(Settings.load(place))
        plain = Settings.load(place, Path(home, "no-configuration"))
        if foreign := [name for name in OWN if getattr(settings, name) != getattr(plain, name)]:
            raise ConfigError(f"a bench fills a stack of its own: leave {', '.join(foreign)} unset for it")
        with stack.running(settings, [use_case.name], only=services):
            broker = wiring.broker(settings)
            broker.create_topics(topics(use_case), use_case.partitions)
            broker.close()
            yield settings


@contextmanager
def apart() -> Iterator[None]:
    """This process, and what it starts without a core of its own, off the core of what is measured."""
    os.sched_setaffinity(0, CORES - {CORE} or CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def _free_base(first: int) -> int:
    """The first range of ports, from the configured one up, that nobody uses."""
    for base in range(first, first + 1000, len(PORTS)):
        if all(map(stack.is_free, range(base, base + len(PORTS)))):
            return base
    raise ConfigError(f"no free ports from {first} to {first + 1000}: set PENSTOCK_PORT_BASE to a free range")


@contextmanager
def process(
    command: Sequence[str], env: Mapping[str, str], core: int | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A child, on one core if given, that gets neither our Ctrl-C nor outlives the block or this process.

    What it compiles is kept with what set-up keeps: in a rig's folder each run would compile, and measure, it anew.
    """
    env = {**env, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(cache() / "numba")}

    def prepare() -> None:
        die_with_parent(signal.SIGTERM)
        if core is not None:
            os.sched_setaffinity(0, {core})

    child = subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, start_new_session=True, preexec_fn=prepare, **options
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
        child.wait(60)


def measured(command: Sequence[str], settings: Settings | None = None, all_cores: bool = False) -> dict[str, Any]:
    """The JSON object that a child, on one core unless it needs all, prints as its last line."""
    env = child_env(settings) if settings else os.environ
    with process(command, env, None if all_cores else CORE, stdout=subprocess.PIPE) as child:
        output = child.communicate()[0]
    if child.returncode:
        raise UnavailableError(f"{' '.join(command[1:])} ended with code {child.returncode}; its messages are above")
    return dict(json.loads(output.splitlines()[-1]))


def redis_client(settings: Settings) -> Any:
    """The rig's Redis, past the online store."""
    return Redis(port=settings.port("redis"), password=settings.secrets["redis_password"])


def produce_flights(settings: Settings, use_case: UseCase, days: int) -> dict[str, int]:
    """The first days of 2013 on Kafka, closed by clock records; contract name -> events."""
    broker = wiring.broker(settings)
    producer = broker.producer()
    topic_of = {contract.name: topic for topic, contract in use_case.event_topics.items()}
    sent = dict.fromkeys(topic_of, 0)
    until = YEAR_MS + days * DAY_MS
    for week in range(YEAR_MS, until, 7 * DAY_MS):
        events = timetable.events(week, min(until, week + 7 * DAY_MS))
        producer.send([Message(topic_of[e.event], e.value, e.key, 0, timestamp=e.time) for e in events])
        producer.flush()
        for event in events:
            sent[event.event] += 1
    producer.send([clock_message(topic, 0, until) for topic in topic_of.values()])
    producer.flush()
    producer.close()
    broker.close()
    return sent


def quantile_ms(values: Sequence[float], q: float) -> float:
    """The q-quantile (nearest rank) of seconds, in ms."""
    return round(sorted(values)[min(len(values) - 1, int(q * len(values)))] * 1000, 1)


def as_text(result: Mapping[str, Any], indent: str = "") -> str:
    """A bench's figures, one a line."""
    lines = []
    for name, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", as_text(value, indent + "  ")]
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            lines.append(f"{indent + name:34} {f'{value:,}' if is_number else value!s:>14}")
    return "\n".join(lines)
