"""A local spool of prediction records: written before the reply, shipped to Kafka when Kafka is there.

One folder: numbered segments of lines, each a JSON head (key, partition, timestamp, headers), a tab and the value;
`position` says up to where Kafka has acknowledged. A line is in the operating system's hands when `append` returns, so
it survives the death of this process (not a power cut: nothing is synced). Shipping is at least once.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from features.errors import ConfigError, StateError, UnavailableError
from pipelines.broker import Message, Producer

log = structlog.get_logger()
SEGMENT_BYTES = 16 << 20
READ_BYTES = 1 << 20
SHIP_EVERY_S = 0.02  # a request to Kafka for each record would take more than the answers


@dataclass(frozen=True, order=True)
class Place:
    """A place in the spool: a segment's number and a byte in it."""

    segment: int
    offset: int


class Head(msgspec.Struct, array_like=True):
    """What a line says of its record besides the value."""

    key: str | None
    partition: int
    timestamp: int | None
    headers: list[tuple[str, str]]


class Spool:
    """The spool in `folder`, for one process at a time.

    max_bytes : what may wait; past it `append` raises UnavailableError

    Raises
    ------
    ConfigError : another process has it open
    """

    def __init__(self, folder: Path, max_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.max_bytes, self.segment_bytes = (folder, max_bytes, segment_bytes)
        self._lock_file = _lock(folder / "lock")
        self.changed = threading.Condition()
        self.closed = False
        position = self._load_position()
        numbers = sorted(int(p.stem) for p in folder.glob("*.log"))
        for number in [n for n in numbers if n < position.segment]:
            self._path(number).unlink()
        self._sizes = {n: self._path(n).stat().st_size for n in numbers if n >= position.segment}
        newest = max(self._sizes, default=position.segment)
        self._file = os.open(self._path(newest), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.end = Place(newest, _cut_torn_line(self._file))
        self._sizes[newest] = self.end.offset
        first = min(self._sizes)
        self.acknowledged = Place(first, min(position.offset, self._sizes[first]) if first == position.segment else 0)

    def append(self, messages: Sequence[Message]) -> None:
        """Write records in one go; returns when they outlive this process.

        Raises
        ------
        UnavailableError : the spool is full, or the disk is
        """
        data = b"".join(_line(message) for message in messages)
        with self.changed:
            if self.waiting_bytes + len(data) > self.max_bytes:
                raise UnavailableError(
                    f"the spool holds {self.waiting_bytes} bytes that Kafka has not taken: spool_max_mb is reached"
                )
            try:
                _write(self._file, data, self.end.offset)
            except OSError as error:
                raise UnavailableError(f"the spool in {self.folder} can't be written: {error.strerror}") from None
            self.end = Place(self.end.segment, self.end.offset + len(data))
            self._sizes[self.end.segment] = self.end.offset
            if self.end.offset >= self.segment_bytes:
                self._roll()
            self.changed.notify_all()

    @property
    def waiting_bytes(self) -> int:
        """Bytes that Kafka has not acknowledged."""
        return sum(self._sizes.values()) - self.acknowledged.offset

    def read(self, place: Place) -> tuple[list[bytes], Place]:
        """Whole lines from `place` on, about a megabyte of them, and the place behind them."""
        with self.changed:
            end = self.end
            while place.segment < end.segment and place.offset >= self._sizes.get(place.segment, 0):
                place = Place(place.segment + 1, 0)
            limit = self._sizes[place.segment]
        data = self._read(place, min(READ_BYTES, limit - place.offset))
        if data and not data.endswith(b"\n"):
            cut = data.rfind(b"\n") + 1
            data = data[:cut] if cut else self._read(place, limit - place.offset).partition(b"\n")[0] + b"\n"
        return data.split(b"\n")[:-1], Place(place.segment, place.offset + len(data))

    def _read(self, place: Place, size: int) -> bytes:
        with open(self._path(place.segment), "rb") as file:
            file.seek(place.offset)
            return file.read(size)

    def acknowledge(self, place: Place) -> None:
        """Remember that everything before `place` has arrived; whole segments before it are deleted."""
        temporary = self.folder / "position.new"
        temporary.write_text(f"{place.segment} {place.offset}\n")
        temporary.rename(self.folder / "position")
        with self.changed:
            self.acknowledged = place
            done = [n for n in self._sizes if n < place.segment]
            for number in done:
                del self._sizes[number]
            self.changed.notify_all()
        for number in done:
            self._path(number).unlink()

    def wait(self, place: Place, timeout: float | None = None) -> bool:
        """Wait until there is something behind `place`; False when closed or the time is over first."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.end > place, timeout)
            return self.end > place

    def wait_shipped(self, timeout: float) -> bool:
        """Wait until everything appended so far is acknowledged."""
        with self.changed:
            end = self.end
            return self.changed.wait_for(lambda: self.acknowledged >= end or self.waiting_bytes == 0, timeout)

    def close(self) -> None:
        """Wake who waits and let go of the folder; what waits stays on disk."""
        with self.changed:
            if self.closed:
                return
            self.closed = True
            self.changed.notify_all()
        os.close(self._file)
        os.close(self._lock_file)

    def _roll(self) -> None:
        os.close(self._file)
        self.end = Place(self.end.segment + 1, 0)
        self._sizes[self.end.segment] = 0
        self._file = os.open(self._path(self.end.segment), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:010d}.log"

    def _load_position(self) -> Place:
        path = self.folder / "position"
        if not path.exists():
            return Place(1, 0)
        try:
            segment, offset = map(int, path.read_text().split())
        except ValueError:
            raise StateError(f"{path}: not a position; delete it to send every spooled record again") from None
        return Place(segment, offset)


class Shipper:
    """The thread that sends a spool's records to a topic.

    make_producer : connects; called again after a failure
    """

    def __init__(
        self,
        spool: Spool,
        topic: str,
        make_producer: Callable[[], Producer],
        *,
        pauses: tuple[float, float] = (0.1, 5.0),
    ) -> None:
        self.spool, self.topic, self.pauses = spool, topic, pauses
        self.connected: bool | None = None
        self._make_producer = make_producer
        self._producer: Producer | None = None
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)

    def start(self) -> Shipper:
        self._thread.start()
        return self

    def stop(self, drain_s: float = 5.0) -> bool:
        """Ship what waits, for up to `drain_s` seconds, and end; False when something is left for the next start."""
        shipped = self.spool.wait_shipped(drain_s if self.connected is not False else 0.0)
        self.spool.close()
        self._thread.join(drain_s)
        return shipped

    def _run(self) -> None:
        place, pause = self.spool.acknowledged, self.pauses[0]
        while not self.spool.closed:
            if not self.spool.wait(place):
                continue
            began = time.monotonic()
            try:
                place = self._ship(place)
            except Exception as error:  # the records are on disk, try again
                self._lost(error)
                self._pause(pause)
                pause = min(2 * pause, self.pauses[1])
            else:
                self._shipped()
                pause = self.pauses[0]
                self._pause(began + SHIP_EVERY_S - time.monotonic())
        self._drop_producer()

    def _ship(self, place: Place) -> Place:
        lines, behind = self.spool.read(place)
        if lines:
            if self._producer is None:
                self._producer = self._make_producer()
            self._producer.send([_message(line, self.topic) for line in lines])
            self._producer.flush()
        if behind != place:
            self.spool.acknowledge(behind)
        return behind

    def _shipped(self) -> None:
        if self.connected is not True:
            log.info("spool is being shipped", topic=self.topic)
        self.connected = True

    def _lost(self, error: Exception) -> None:
        if self.connected is not False:
            waiting = self.spool.waiting_bytes
            log.warning(
                "spool can't be shipped, trying again", topic=self.topic, error=str(error), waiting_bytes=waiting
            )
        self.connected = False
        self._drop_producer()

    def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            try:
                producer.close()
            except Exception as error:  # it is being given up anyway
                log.info("producer did not close", error=str(error))

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self.spool.changed:
            self.spool.changed.wait_for(lambda: self.spool.closed or time.monotonic() >= deadline, seconds)


def _line(message: Message) -> bytes:
    headers = [(name, value.decode()) for name, value in message.headers]
    head = Head(message.key.decode() if message.key else None, message.partition, message.timestamp, headers)
    return msgspec.json.encode(head) + b"\t" + (message.value or b"") + b"\n"


_head = msgspec.json.Decoder(Head)


def _message(line: bytes, topic: str) -> Message:
    raw, _, value = line.partition(b"\t")
    head = _head.decode(raw)
    headers = tuple((name, text.encode()) for name, text in head.headers)
    return Message(topic, value, head.key.encode() if head.key else None, head.partition, headers, head.timestamp)


def _lock(path: Path) -> int:
    """Hold a lock on `path` as long as this process lives."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise ConfigError(f"another process uses the spool {path.parent}: give this one another port") from None
    return file


def _write(file: int, data: bytes, before: int) -> None:
    """Append `data`; on failure the file ends at `before` again."""
    try:
        written = 0
        while written < len(data):
            written += os.write(file, data[written:])
    except OSError:
        os.ftruncate(file, before)
        raise


def _cut_torn_line(file: int) -> int:
    """Cut off what a crash left of a last line; returns the file's size."""
    size = os.fstat(file).st_size
    end = size
    while end:
        start = max(0, end - READ_BYTES)
        last = os.pread(file, end - start, start).rfind(b"\n")
        end = start + last + 1 if last >= 0 else start
        if last >= 0:
            break
    if end < size:
        log.warning("a torn record was cut off the spool", bytes=size - end)
        os.ftruncate(file, end)
    return end
