"""Cuts of one partition and of several."""

from __future__ import annotations

import json
from dataclasses import replace

from pipelines.broker import Message, clock_message
from services.cuts import Cuts
from tests.memory_broker import MemoryBroker
from tests.toy import use_case


def test_a_cut_is_one_when_every_partition_has_announced_it() -> None:
    broker = MemoryBroker()
    broker.create_topics({"toy.cuts": {}}, 2)
    producer = broker.producer()

    def announce(partition: int, cut: int, total: int) -> None:
        value = json.dumps({"cut": cut, "examples": 1, "total": total}).encode()
        producer.send([Message("toy.cuts", value, b"cut", partition), clock_message("toy.cuts", partition, cut)])

    cuts = Cuts(broker, replace(use_case, partitions=2))
    assert cuts.newest() == (0, 0)
    announce(0, 10, 3)
    announce(0, 20, 5)
    assert cuts.newest() == (0, 0)
    announce(1, 10, 4)
    assert cuts.newest() == (10, 7)
    announce(1, 20, 6)
    assert cuts.newest() == (20, 11)
    cuts.close()
