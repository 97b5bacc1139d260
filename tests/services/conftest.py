"""Fixtures of the predictor's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.memory_store import MemoryStore
from services.predict_app import create_app
from services.serving_state import ModelSlot, Prior, Serving
from services.settings import Settings
from services.spool import Spool
from tests.predict_rig import NOW, Make, Service, Store
from tests.toy import use_case


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Service] = []

    def service(declared: Any = use_case, spool_bytes: int = 1 << 20, **settings: Any) -> Service:
        store = Store(MemoryStore(declared))
        spool = Spool(tmp_path / "spool", spool_bytes)
        slot = ModelSlot(Serving(Prior(declared.prior)))
        app = create_app(declared, store, spool, slot, Settings(**settings), clock=lambda: NOW)
        made.append(Service(store, spool, slot, app))
        return made[-1]

    yield service
    for each in made:
        each.spool.close()


@pytest.fixture
def service(make: Make) -> Service:
    return make()
