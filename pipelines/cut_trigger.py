"""What wakes Airflow: a cut announced on `<uc>.cuts`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from airflow.providers.apache.kafka.triggers.shared_stream import KafkaSharedStreamTrigger
from airflow.triggers.base import TriggerEvent


class CutTrigger(KafkaSharedStreamTrigger):
    """Kafka's shared trigger (one consumer for all DAGs) that passes over the clock records between the cuts."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Where the triggerer finds this class, and with what it makes one."""
        return f"{CutTrigger.__module__}.{CutTrigger.__qualname__}", super().serialize()[1]

    async def filter_shared_stream(self, shared_stream: AsyncIterator[Any]) -> AsyncIterator[TriggerEvent]:
        """One event per record with a value."""
        async for value in shared_stream:
            if value is not None:
                yield TriggerEvent(self._decode(value))  # type: ignore[no-untyped-call]
