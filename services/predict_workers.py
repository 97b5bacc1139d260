"""Processes that answer on one port: a dead one is started again, and any of them tells of all.

They share one listening socket, so what waits in it when one dies is answered by another. Each has a private port on
loopback, where it tells of itself alone; who asks on the shared one gets what all of them say.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

import httpx
import msgspec
import structlog
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from services.processes import die_with_parent

log = structlog.get_logger()
PATIENCE_S = 2.0
RESTART_S = 1.0
DRAIN_S = 20.0


def run_workers(work: Callable[[int], None], count: int) -> None:
    """Run `work(i)` in forks of this process until it is told to stop; one that ends is started again."""
    forks = multiprocessing.get_context("fork")

    def start(i: int) -> Any:
        worker = forks.Process(target=_work, args=(work, i), name=f"predictor-{i}")
        worker.start()
        return worker

    workers = [start(i) for i in range(count)]
    try:
        while True:
            wait([worker.sentinel for worker in workers])
            for i, worker in enumerate(workers):
                if not worker.is_alive():
                    log.error("a worker ended and is started again", worker=i, code=worker.exitcode)
                    time.sleep(RESTART_S)
                    workers[i] = start(i)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(DRAIN_S)


def _work(work: Callable[[int], None], i: int) -> None:
    die_with_parent(signal.SIGTERM)
    work(i)


class Siblings:
    """The processes behind one port, by their private ports."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = ports

    async def _ask(self, path: str) -> list[str]:
        """Each one's answer; "" from one that gives none."""
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
            asked = (client.get(f"http://127.0.0.1:{port}{path}") for port in self.ports)
            replies = await asyncio.gather(*asked, return_exceptions=True)
        return [reply.text if isinstance(reply, httpx.Response) else "" for reply in replies]

    async def readiness(self) -> dict[str, Any]:
        """The report of the one that is furthest behind."""
        reports = []
        for i, text in enumerate(await self._ask("/readyz")):
            silent = {"ready": False, "generation": None, "problem": f"worker {i} does not answer"}
            reports.append(msgspec.json.decode(text) if text else silent)
        return dict(min(reports, key=_progress)) | {"workers": len(reports)}

    async def metrics(self) -> _Families:
        """Everyone's samples, with a label `worker`."""
        return _Families(await self._ask("/metrics"))


def _progress(report: dict[str, Any]) -> tuple[bool, int, int]:
    generation = report["generation"]
    return report["ready"], -1 if generation is None else generation, report.get("refresh", 0)


class _Families:
    """Metrics as a registry gives them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for i, text in enumerate(self.texts):
            for family in text_string_to_metric_families(text):
                kept = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                kept.samples += [s._replace(labels={**s.labels, "worker": str(i)}) for s in family.samples]
        yield from merged.values()
