"""The replay's side of Kafka: events produced once each, and the topics whose records it waits for."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from features.usecase import UseCase
from pipelines.broker import SENT_HEADER, Broker, Message, TopicPartition, clock_message
from services.source import Request, Source
from services.topic_reader import Tail, tails

Sent = list[tuple[int, int]]


class Feed:
    """Produces a use case's events, each once, also after an earlier replay was cut off anywhere.

    `position` : every event before it is on Kafka (epoch ms)
    """

    def __init__(self, broker: Broker, use_case: UseCase, source: Source, from_ms: int) -> None:
        self.topics = {contract.name: topic for topic, contract in use_case.event_topics.items()}
        self.use_case, self.source = use_case, source
        self._tails = tails(broker, sorted(self.topics.values()))
        self.producer = broker.producer()
        self.clock = _lowest(self._tails)
        self.position = max(from_ms, self.clock or 0)

    def produce(self, until_ms: int) -> Sent:
        """Events with time < until_ms that are not there yet; (event time, `sent`) of each, in epoch ms."""
        messages, sent = [], []
        now = round(time.time() * 1000)
        headers = ((SENT_HEADER, str(now).encode()),)
        for event in self.source.events(self.position, until_ms):
            tp = (self.topics[event.event], self.use_case.partition(event.key.decode()))
            if not self._is_there(tp, event.time, event.value):
                messages.append(Message(tp[0], event.value, event.key, tp[1], headers, event.time))
                sent.append((event.time, now))
        self.producer.send(messages)
        self.position = max(self.position, until_ms)
        return sent

    def mark(self, time_ms: int) -> None:
        """The clock record on every partition of the event topics; all before it is acknowledged on return."""
        if self.clock is None or self.clock < time_ms:
            partitions = range(self.use_case.partitions)
            self.send([clock_message(t, i, time_ms) for t in self.topics.values() for i in partitions])
            self.clock = time_ms
            self._tails.clear()

    def send(self, messages: Sequence[Message]) -> None:
        """Send and wait for the acknowledgements."""
        self.producer.send(messages)
        self.producer.flush()

    def _is_there(self, partition: TopicPartition, time_ms: int, value: bytes) -> bool:
        tail = self._tails.get(partition)
        return tail is not None and (time_ms < (tail.clock or 0) or any(r.value == value for r in tail.after))


class Followed:
    """A topic of requests or predictions: which request ids have come, and up to when it is complete (`clock`)."""

    def __init__(self, broker: Broker, use_case: UseCase, name: str) -> None:
        self.use_case, self.topic = use_case, use_case.topic(name)
        topic = self.topic
        found = tails(broker, [topic])
        self.clock = _lowest(found)
        self.ids = {r.key.decode() for tail in found.values() for r in tail.after if r.key is not None}
        self._consumer = broker.consumer([topic])
        for tp, tail in found.items():
            self._consumer.seek(tp, tail.end)

    def read(self, wait_s: float = 0.0) -> set[str]:
        """Ids since the last clock, waiting at most `wait_s` for more."""
        self.ids |= {r.key.decode() for r in self._consumer.poll(wait_s) if r.key is not None and r.value is not None}
        return self.ids

    def clock_messages(self, time_ms: int) -> list[Message]:
        """The clock records that move `clock` to time_ms; none when it is there already."""
        if self.clock is not None and self.clock >= time_ms:
            return []
        self.clock = time_ms
        return [clock_message(self.topic, i, time_ms) for i in range(self.use_case.partitions)]

    def request_message(self, request: Request) -> Message:
        """A scoring request as a record of this topic."""
        partition = self.use_case.partition_of({**request.row["entities"], **request.row.get("fields", {})})
        value = msgspec.json.encode(request.row)
        return Message(self.topic, value, request.id.encode(), partition, timestamp=request.time)

    def close(self) -> None:
        self._consumer.close()


def _lowest(tails_of: dict[TopicPartition, Tail]) -> int | None:
    """The clock that every partition has reached; None when one has none."""
    clocks = [tail.clock for tail in tails_of.values()]
    return None if None in clocks else min((c for c in clocks if c is not None), default=None)
