"""27 features from Kafka, values kept in state: a fold by hand in Quix Streams, run in the environment of its lock.

`python quixstreams_fold.py BROKER TOPIC EVENTS END_MS STATE_DIR` prints JSON. The state of a key is one entry of packed
integers: the totals of its windows and the buckets of each slide that hold events, so an event costs one read and one
write per grouping. One state prefix for all groupings instead of a topic to re-key each, no JSON, changelog off.
"""

import json
import sys
import time
from array import array
from typing import Any

from quixstreams import Application
from quixstreams.models import Deserializer

MINUTE = 60_000
SLIDES = (15 * MINUTE, 60 * MINUTE)
WINDOWS = ((60 * MINUTE, 0, False), (180 * MINUTE, 0, True), (1440 * MINUTE, 1, True))  # length, slide, its longest
# An entry: how many of its numbers are buckets of the first slide; for each window the first bucket it covers, count,
# sum, late; then the buckets, oldest first, of the first slide and of the second: number, count, sum, late.
TOTALS, BUCKETS = 1, 1 + 4 * len(WINDOWS)
EMPTY = array("q", [0] * BUCKETS).tobytes()


class OneKey(Deserializer):
    """All messages share one state."""

    def __call__(self, value: bytes, ctx: object) -> bytes:
        return b"all"


def region(entry: "array[int]", slide: int) -> tuple[int, int]:
    """Where the buckets of a slide begin and end."""
    middle = BUCKETS + entry[0]
    return (middle, len(entry)) if slide else (BUCKETS, middle)


def expire(entry: "array[int]", now: int) -> None:
    """Take what has left each window out of its totals; `now` is the instant of the value."""
    for w, (length, slide, longest) in enumerate(WINDOWS):
        at, last = TOTALS + 4 * w, (now - length) // SLIDES[slide]
        first = entry[at]
        if first >= last:
            continue
        entry[at] = last
        start, end = region(entry, slide)
        i = start
        while i < end and entry[i] < last:
            if entry[i] >= first:
                entry[at + 1] -= entry[i + 1]
                entry[at + 2] -= entry[i + 2]
                entry[at + 3] -= entry[i + 3]
            i += 4
        if longest and i > start:
            del entry[start:i]
            entry[0] -= (i - start) * (slide == 0)


def add(entry: "array[int]", at_ms: int, delay: int, late: int) -> None:
    """Count one event in the totals and in the newest bucket of each slide."""
    for at in range(TOTALS, BUCKETS, 4):
        entry[at + 1] += 1
        entry[at + 2] += delay
        entry[at + 3] += late
    for slide, length in enumerate(SLIDES):
        (start, end), number = region(entry, slide), at_ms // length
        if end > start and entry[end - 4] == number:
            entry[end - 3] += 1
            entry[end - 2] += delay
            entry[end - 1] += late
        else:
            entry[end:end] = array("q", (number, 1, delay, late))
            entry[0] += 4 * (slide == 0)


def values(entry: "array[int]") -> list[Any]:
    """Count, mean delay and rate of late ones for each window; null when it is empty."""
    out: list[Any] = []
    for at in range(TOTALS, BUCKETS, 4):
        count, total, late = entry[at + 1 : at + 4]
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
            place = f"{name}:{row[name]}".encode()
            entry = array("q", state.get_bytes(place, EMPTY))
            expire(entry, timestamp + 1)
            add(entry, timestamp, delay, delay > 15)
            values(entry)
            state.set_bytes(place, entry.tobytes())
        self.left -= 1
        if not self.left:
            self.seconds, self.cpu_seconds = (b - a for a, b in zip(self.began, now(), strict=True))
            self.result = {
                name: {k: self.read(state, f"{name}:{k}".encode()) for k in ks} for name, ks in self.keys.items()
            }

    def read(self, state: Any, place: bytes) -> list[Any]:
        """The values at the end."""
        entry = array("q", state.get_bytes(place))
        expire(entry, self.end)
        return values(entry)


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
