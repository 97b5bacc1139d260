"""Housekeeping of a use case's feature rows: small offline files become large, old ones go, dead online keys too.

It runs beside everything else, as often as one likes, and may be killed at any point.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from features.usecase import UseCase
from pipelines.broker import Broker
from pipelines.checkpoint import watermark_of
from pipelines.feature_store import FeatureStore
from pipelines.offline_files import partitions
from services import wiring
from services.settings import Settings

DAY = 86_400_000  # ms
GRACE_S = 3600.0  # who listed a file before it was merged has read it by then


@dataclass
class Done:
    """Files written by merging, files that retention took rows from, files deleted, online rows forgotten."""

    merged: int = 0
    shortened: int = 0
    deleted: int = 0
    forgotten: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.merged} larger offline files written, {self.shortened} shortened by retention, "
            f"{self.deleted} old ones deleted, {self.forgotten} dead online rows removed"
        )


def housekeeping(settings: Settings, use_case: UseCase) -> Done:
    """One round for a use case; what it did."""
    with closing(wiring.broker(settings)) as broker, closing(wiring.feature_store(settings, use_case)) as store:
        return keep_house(settings, use_case, broker, store, time.time())


def keep_house(settings: Settings, use_case: UseCase, broker: Broker, store: FeatureStore, now: float) -> Done:
    """now : epoch seconds, by the clock that dates files"""
    done = Done()
    watermark = watermark_of(broker, f"{use_case.name}.featurizer")
    if watermark is None:
        return done
    for part in partitions(settings.state_url, use_case.name, broker):
        for view in use_case.views:
            if settings.offline_keep_days:
                done.shortened += part.retain(view, watermark - settings.offline_keep_days * DAY)
            done.merged += part.merge(view.name)
            done.deleted += part.remove(view.name, now - GRACE_S)
    done.forgotten = store.forget(watermark - DAY)
    return done
