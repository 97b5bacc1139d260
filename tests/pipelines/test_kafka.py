"""The compiled record reader beside the client's own."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest

from pipelines.kafka import TopicPartition, _records, kafka_errors

client = importlib.import_module("kafka.record.default_records")  # `pipelines.kafka` quiets what its import warns of
HERE = TopicPartition("t", 3)
NONE, GZIP, LZ4, ZSTD = 0, 1, 3, 4


def batch_of(records: list[tuple[Any, ...]], codec: int = NONE) -> bytes:
    """Records (timestamp, key, value, headers) as a producer sends them."""
    builder = client.DefaultRecordBatchBuilder(2, codec, False, -1, -1, -1, 1 << 20)
    for i, (timestamp, key, value, headers) in enumerate(records):
        assert builder.append(i, timestamp, key, value, headers)
    return bytes(builder.build())


@pytest.mark.parametrize("codec", [NONE, GZIP, LZ4, ZSTD])
@pytest.mark.parametrize("seed", range(5))
def test_records_equal_those_of_the_clients_reader(codec: int, seed: int) -> None:
    """But a header without a value has an empty one."""
    rng = random.Random(seed)

    def some() -> bytes | None:
        return rng.choice([None, b"", rng.randbytes(rng.choice([1, 63, 64, 8_191, 8_192]))])

    records = [
        (
            rng.randrange(2**42),
            some(),
            some(),
            [("ü" * rng.randrange(70), some()) for _ in range(rng.choice([0, 0, 2]))],
        )
        for _ in range(rng.randrange(1, 40))
    ]
    raw = batch_of(records, codec)
    expected = [
        (r.offset, r.timestamp, r.key, r.value, tuple((n, v or b"") for n, v in r.headers))
        for r in client.DefaultRecordBatch(raw)
    ]
    found = _records(HERE, client.DefaultRecordBatch(raw))
    assert [(r.offset, r.timestamp, r.key, r.value, r.headers) for r in found] == expected
    assert {(r.topic, r.partition) for r in found} == {HERE}


def test_a_malformed_batch_is_refused() -> None:
    """Whatever byte is another: all lengths must fit into each other."""
    raw = batch_of([(1_000 + i, b"key", b"value" * i, [("name", b"x" * i)] * i) for i in range(5)])
    start, refused = client.DefaultRecordBatch.HEADER_STRUCT.size, 0
    for at in range(start, len(raw)):
        for byte in (0, 1, 127, 128, 255):
            changed = raw[:at] + bytes([byte]) + raw[at + 1 :]
            try:
                assert len(_records(HERE, client.DefaultRecordBatch(changed))) == 5
            except kafka_errors.CorruptRecordError:
                refused += 1
    assert refused > 100
