"""The predictor's application over HTTP in process, with what it writes to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pipelines.memory_store import MemoryStore
from services.serving_state import ModelSlot
from services.spool import Place, Spool

NOW = 1_767_225_600_123
ROW = {"request_id": "r1", "entities": {"shop": "a", "item": 1}, "fields": {"price": 6.0}}


@dataclass
class Store:
    """A memory store that can be away or broken."""

    rows: MemoryStore
    error: Exception | None = None
    reads: int = 0

    def read(self, keys: Sequence[Mapping[str, Any]]) -> Any:
        self.reads += 1
        if self.error:
            raise self.error
        return self.rows.read(keys)


@dataclass
class Service:
    """The application and what it writes to."""

    store: Store
    spool: Spool
    slot: ModelSlot
    app: Any

    def send(self, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        """Send requests (method, path, options) at once."""

        async def go() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://p") as client:
                return list(await asyncio.gather(*(client.request(m, p, **o) for m, p, o in requests)))

        return asyncio.run(go())

    def predict(self, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send(("POST", "/predict", {"content": content}))[0]

    def get(self, path: str) -> httpx.Response:
        return self.send(("GET", path, {}))[0]

    def records(self) -> list[tuple[Any, dict[str, Any]]]:
        """Spooled (head, value) pairs."""
        lines = [line.partition(b"\t") for line in self.spool.read(Place(1, 0))[0]]
        return [(json.loads(head), json.loads(value)) for head, _, value in lines]

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(f"penstock_predict_{name}")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


Make = Callable[..., Service]
