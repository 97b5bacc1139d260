"""The cuts that the joiner has announced."""

from __future__ import annotations

import json

from features.usecase import UseCase
from pipelines.broker import Broker
from services.topic_reader import read_new


class Cuts:
    """`<uc>.cuts` as it is now. A partition announces by itself, so a cut is one when every partition has."""

    def __init__(self, broker: Broker, use_case: UseCase) -> None:
        self._consumer = broker.consumer([use_case.topic("cuts")])
        self._partitions = use_case.partitions
        self._totals: dict[int, dict[int, int]] = {}

    def newest(self) -> tuple[int, int]:
        """The newest cut (epoch ms; 0 without one), and how many examples there are before it."""
        for record in read_new(self._consumer):
            if record.value is not None:
                value = json.loads(record.value)
                self._totals.setdefault(int(value["cut"]), {})[record.partition] = int(value["total"])
        whole = {cut: totals for cut, totals in self._totals.items() if len(totals) == self._partitions}
        cut = max(whole, default=0)
        return cut, sum(whole.get(cut, {}).values())

    def close(self) -> None:
        self._consumer.close()
