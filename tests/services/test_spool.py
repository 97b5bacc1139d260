"""Nothing that was appended is lost, whatever dies; nothing blocks, whatever is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from features.errors import ConfigError, StateError, UnavailableError
from pipelines.broker import Message
from services.spool import Place, Shipper, Spool

MB = 1 << 20


class Kafka:
    """A producer that can be away; `taken` is what it acknowledged, in order."""

    def __init__(self) -> None:
        self.away = False
        self.taken: list[Message] = []
        self.requests = 0
        self.connections = 0
        self._sent: list[Message] = []

    def __call__(self) -> Any:
        if self.away:
            raise UnavailableError("no broker")
        self.connections += 1
        return self

    def send(self, messages: Sequence[Message]) -> None:
        self._sent += messages

    def flush(self, timeout: float = 30.0) -> None:
        sent, self._sent = self._sent, []
        if self.away:
            raise UnavailableError("no broker")
        self.taken += sent
        self.requests += 1

    def close(self) -> None:
        self._sent = []


def message(i: int, size: int = 0) -> Message:
    value = f'{{"i": {i}, "ä": "{"x" * size}"}}'.encode()
    return Message("toy.predictions", value, f"r-{i}".encode(), i % 3, (("sent", str(i).encode()),), 1000 + i)


def eventually(what: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not come true in time"
        threading.Event().wait(0.002)


def shipping(folder: Path, kafka: Kafka, **options: Any) -> tuple[Spool, Shipper]:
    spool = Spool(folder, MB, **options)
    return spool, Shipper(spool, "toy.predictions", kafka, pauses=(0.01, 0.05)).start()


def test_records_arrive_whole_and_in_order(tmp_path: Path) -> None:
    kafka = Kafka()
    spool, shipper = shipping(tmp_path, kafka)
    for i in range(0, 30, 3):
        spool.append([message(j) for j in range(i, i + 3)])
    assert shipper.stop()
    assert kafka.taken == [message(i) for i in range(30)]
    assert spool.waiting_bytes == 0


def test_a_record_goes_at_once_and_those_soon_after_it_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.spool.SHIP_EVERY_S", 1.0)
    kafka = Kafka()
    spool, shipper = shipping(tmp_path, kafka)
    spool.append([message(0)])
    assert spool.wait_shipped(5)
    for i in range(1, 21):
        spool.append([message(i)])
    assert spool.wait_shipped(5)
    shipper.stop()
    assert (kafka.requests, kafka.taken) == (2, [message(i) for i in range(21)])


def test_kafka_may_be_away_and_come_back(tmp_path: Path) -> None:
    kafka = Kafka()
    spool, shipper = shipping(tmp_path, kafka)
    spool.append([message(0)])
    assert spool.wait_shipped(5)
    kafka.away = True
    spool.append([message(i) for i in range(1, 5)])
    eventually(lambda: shipper.connected is False)
    assert spool.waiting_bytes > 0
    kafka.away = False
    assert spool.wait_shipped(5)
    shipper.stop()
    assert kafka.taken == [message(i) for i in range(5)]


def test_what_was_not_acknowledged_is_sent_by_the_next_process(tmp_path: Path) -> None:
    kafka = Kafka()
    kafka.away = True
    spool, shipper = shipping(tmp_path, kafka)
    spool.append([message(i) for i in range(5)])
    eventually(lambda: shipper.connected is False)
    assert not shipper.stop(0.2)
    kafka.away = False
    spool, shipper = shipping(tmp_path, kafka)
    assert spool.wait_shipped(5)
    assert shipper.stop()
    assert kafka.taken == [message(i) for i in range(5)]


def test_segments_roll_and_are_deleted_once_they_arrived(tmp_path: Path) -> None:
    kafka = Kafka()
    kafka.away = True
    spool, shipper = shipping(tmp_path, kafka, segment_bytes=300)
    for i in range(20):
        spool.append([message(i)])
    assert len(list(tmp_path.glob("*.log"))) > 3
    kafka.away = False
    assert spool.wait_shipped(5)
    assert shipper.stop()
    assert kafka.taken == [message(i) for i in range(20)]
    assert len(list(tmp_path.glob("*.log"))) == 1
    spool, shipper = shipping(tmp_path, kafka, segment_bytes=300)
    spool.append([message(20)])
    assert shipper.stop()
    assert kafka.taken[20:] == [message(20)]


def test_records_longer_than_one_read_are_shipped_whole(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 8 * MB)
    kafka = Kafka()
    records = [message(0), message(1, size=3 * MB), message(2)]
    spool.append(records)
    shipper = Shipper(spool, "toy.predictions", kafka).start()
    assert shipper.stop()
    assert kafka.taken == records


def test_a_full_spool_refuses_and_takes_again_when_there_is_room(tmp_path: Path) -> None:
    kafka = Kafka()
    spool = Spool(tmp_path, 1000)
    spool.append([message(0, size=800)])
    with pytest.raises(UnavailableError, match="spool_max_mb"):
        spool.append([message(1, size=800)])
    shipper = Shipper(spool, "toy.predictions", kafka).start()
    assert spool.wait_shipped(5)
    spool.append([message(2, size=800)])
    assert shipper.stop()
    assert kafka.taken == [message(0, 800), message(2, 800)]


def test_a_torn_last_record_is_cut_off(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MB)
    spool.append([message(0), message(1)])
    spool.close()
    log = tmp_path / "0000000001.log"
    os.truncate(log, log.stat().st_size - 4)
    kafka = Kafka()
    spool, shipper = shipping(tmp_path, kafka)
    spool.append([message(2)])
    assert shipper.stop()
    assert kafka.taken == [message(0), message(2)]


def test_a_position_behind_the_data_sends_what_comes_next(tmp_path: Path) -> None:
    (tmp_path / "position").write_text("1 500\n")
    kafka = Kafka()
    spool, shipper = shipping(tmp_path, kafka)
    spool.append([message(0)])
    assert shipper.stop()
    assert kafka.taken == [message(0)]


def test_a_damaged_position_is_named(tmp_path: Path) -> None:
    (tmp_path / "position").write_text("abc")
    with pytest.raises(StateError, match="position"):
        Spool(tmp_path, MB)


def test_two_processes_can_not_share_a_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MB)
    with pytest.raises(ConfigError, match="another process"):
        Spool(tmp_path, MB)
    spool.close()
    Spool(tmp_path, MB).close()


def test_a_disk_that_is_full_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, MB)
    spool.append([message(0)])
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(file, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(UnavailableError, match="No space left"):
            spool.append([message(1)])
    spool.append([message(2)])
    assert [line.split(b"\t")[1] for line in spool.read(Place(1, 0))[0]] == [message(0).value, message(2).value]
    spool.close()


WRITER = """
import sys
from pathlib import Path
from tests.services.test_spool import message
from services.spool import Spool
spool = Spool(Path(sys.argv[1]), 1 << 30, segment_bytes=100_000)
i = 0
while True:
    spool.append([message(i), message(i + 1)])
    i += 2
    print(i, flush=True)
"""


def test_what_a_killed_process_appended_is_all_there(tmp_path: Path) -> None:
    """kill -9 of a real writer: every append that returned is read back, in order, and at most one more."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert writer.stdout
    told = 0
    for line in writer.stdout:
        told = int(line)
        if told >= 2000:
            writer.send_signal(signal.SIGKILL)
            break
    told = max([told, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    writer.wait(10)
    writer.stdout.close()
    kafka = Kafka()
    spool = Spool(tmp_path, 1 << 30)
    shipper = Shipper(spool, "toy.predictions", kafka).start()
    assert spool.wait_shipped(10)
    assert shipper.stop()
    n = len(kafka.taken)
    assert kafka.taken == [message(i) for i in range(n)]
    assert told <= n <= told + 2
