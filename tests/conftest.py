"""Services that several test files share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import prometheus_client  # noqa: F401  before Feast, which has it keep its values in files that processes share
import pytest

from services.settings import PORTS, Settings


def free_ports() -> int:
    """A port base with room for every service of the stack, below the range that the kernel hands out."""
    from services.stack import is_free

    for base in random.sample(range(20_000, 30_000, 20), 200):
        if all(map(is_free, range(base, base + len(PORTS)))):
            return base
    raise RuntimeError("no free ports between 20000 and 30000")


@pytest.fixture(scope="session")
def kafka_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings that reach a real broker, one per test session."""
    from services import stack

    home: Path = tmp_path_factory.mktemp("kafka")
    settings = Settings.load({"PENSTOCK_HOME": str(home), "PENSTOCK_PORT_BASE": str(free_ports())})
    with stack.running(settings, only=["kafka"]) as reachable:
        yield reachable


@pytest.fixture(scope="session")
def kafka(kafka_settings: Settings) -> str:
    """The address of a real broker."""
    return kafka_settings.kafka_bootstrap
