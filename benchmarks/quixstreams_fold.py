"""27 features from Kafka, values kept in state: a fold by hand in Quix Streams, run in the environment of its lock.

`python quixstreams_fold.py BROKER TOPIC EVENTS END_MS STATE_DIR` prints JSON. Each key has one small entry (totals of
its windows and the open bucket of each slide) and one entry per closed bucket, so an event costs one read and one
write per grouping whatever the window; buckets that leave are read once. Packed integers instead of the default JSON,
one state prefix for all groupings instead of a topic to re-key each, changelog off.
"""

import json
import struct
import sys
import time
from typing import Any

from quixstreams import Application
from quixstreams.models import Deserializer

MINUTE = 60_000
SLIDES = (15 * MINUTE, 60 * MINUTE)
WINDOWS = ((60 * MINUTE, 0), (180 * MINUTE, 0), (1440 * MINUTE, 1))  # length, index of its slide
HEAD, BUCKET = struct.Struct("<20q"), struct.Struct("<3q")
# A head: for each window its first bucket, count, sum, late; for each slide its open bucket's number, count, sum, late.
FIRST_OPEN = 4 * len(WINDOWS)


class OneKey(Deserializer):
    """All messages share one state."""

    def __call__(self, value: bytes, ctx: object) -> bytes:
        return b"all"


def bucket_key(key: bytes, slide: int, number: int) -> bytes:
    return b"%b|%d|%d" % (key, slide, number)


def expire(state: Any, key: bytes, head: list[int], now: int) -> None:
    """Take what has left each window out of its totals; `now` is the instant of the value."""
    for w, (length, s) in enumerate(WINDOWS):
        at, opened = 4 * w, FIRST_OPEN + 4 * s
        first, last = head[at], (now - length) // SLIDES[s]
        if first >= last:
            continue
        head[at] = last
        if head[at + 1] == 0:
            continue
        for number in range(first, min(last, head[opened])):
            if raw := state.get_bytes(bucket_key(key, s, number)):
                count, total, late = BUCKET.unpack(raw)
                head[at + 1] -= count
                head[at + 2] -= total
                head[at + 3] -= late
                if length == max(x for x, slide in WINDOWS if slide == s):
                    state.delete(bucket_key(key, s, number))
        if head[opened] < last:  # the open bucket itself has left
            head[at + 1] = head[at + 2] = head[at + 3] = 0


def add(state: Any, key: bytes, head: list[int], at_ms: int, delay: int, late: int) -> None:
    """Count one event in the totals and in the open buckets, closing those that are over."""
    for w in range(len(WINDOWS)):
        at = 4 * w
        head[at + 1] += 1
        head[at + 2] += delay
        head[at + 3] += late
    for s, slide in enumerate(SLIDES):
        at, number = FIRST_OPEN + 4 * s, at_ms // slide
        if head[at] != number:
            if head[at + 1]:
                state.set_bytes(bucket_key(key, s, head[at]), BUCKET.pack(*head[at + 1 : at + 4]))
            head[at : at + 4] = [number, 0, 0, 0]
        head[at + 1] += 1
        head[at + 2] += delay
        head[at + 3] += late


def values(head: list[int]) -> list[Any]:
    """Count, mean delay and rate of late ones for each window; null when it is empty."""
    out: list[Any] = []
    for w in range(len(WINDOWS)):
        count, total, late = head[4 * w + 1 : 4 * w + 4]
        out += [count, total / count if count else None, late / count if count else None]
    return out


class Fold:
    """The job of one event; after the last one it reads the values of every key as of `end` (epoch ms)."""

    def __init__(self, events: int, end: int) -> None:
        self.left, self.end = events, end
        self.keys: dict[str, set[str]] = {"origin": set(), "carrier": set(), "dest": set()}
        self.began: tuple[float, float] | None = None
        self.seconds = self.cpu_seconds = 0.0
        self.result: dict[str, dict[str, Any]] = {}

    def __call__(self, row: dict[str, Any], key: Any, timestamp: int, headers: Any, state: Any) -> None:
        self.began = self.began or now()
        delay = row["dep_delay"]
        for name, seen in self.keys.items():
            seen.add(row[name])
            entry = f"{name}:{row[name]}".encode()
            raw = state.get_bytes(entry)
            head = list(HEAD.unpack(raw)) if raw else [0] * 20
            expire(state, entry, head, timestamp + 1)
            add(state, entry, head, timestamp, delay, delay > 15)
            values(head)
            state.set_bytes(entry, HEAD.pack(*head))
        self.left -= 1
        if not self.left:
            self.seconds, self.cpu_seconds = (b - a for a, b in zip(self.began, now(), strict=True))
            self.result = {
                name: {k: self.read(state, f"{name}:{k}".encode()) for k in ks} for name, ks in self.keys.items()
            }

    def read(self, state: Any, entry: bytes) -> list[Any]:
        """The values at the end."""
        head = list(HEAD.unpack(state.get_bytes(entry)))
        expire(state, entry, head, self.end)
        return values(head)


def now() -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    return time.monotonic(), time.process_time()


def main(broker: str, topic: str, events: int, end: int, state_dir: str) -> dict[str, Any]:
    fold = Fold(events, end)
    app = Application(
        broker,
        consumer_group="quixstreams-fold",
        auto_offset_reset="earliest",
        state_dir=state_dir,
        use_changelog_topics=False,
        auto_create_topics=False,
        loglevel="ERROR",
    )
    stream = app.dataframe(app.topic(topic, key_deserializer=OneKey(), value_deserializer="json"))
    stream.update(fold, stateful=True, metadata=True)
    app.run(count=events, collect=False)
    return {"seconds": fold.seconds, "cpu_seconds": fold.cpu_seconds, "values": fold.result}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))
