"""Housekeeping of a use case: small offline files become large, old ones go; so do dead online keys, finished backfills
and versions that never served.

It runs beside everything else, as often as one likes, and may be killed at any point.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from features.usecase import UseCase
from pipelines.backfill import forget
from pipelines.broker import Broker
from pipelines.checkpoint import Plan, unserved_views, watermark_of
from pipelines.control import STATE_KEY
from pipelines.feature_store import FeatureStore
from pipelines.featurizer import Featurizer
from pipelines.offline_files import Partition, partitions
from pipelines.registry import Registry
from services import wiring
from services.settings import Settings
from services.topic_reader import Newest

DAY = 86_400_000  # ms
SERVED = {"champion", "retired", "rolled_back"}
GRACE_S = 3600.0  # who listed a file before it was merged has read it by then


@dataclass
class Done:
    """Files written by merging, files that retention took rows from, files deleted, online rows forgotten, backfills
    whose state was removed, versions removed from the registry."""

    merged: int = 0
    shortened: int = 0
    deleted: int = 0
    forgotten: int = 0
    backfills: int = 0
    versions: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.merged} larger offline files written, {self.shortened} shortened by retention, "
            f"{self.deleted} old ones deleted, {self.forgotten} dead online rows removed, "
            f"{self.backfills} finished backfills removed, {self.versions} versions that never served removed"
        )


def housekeeping(settings: Settings, use_case: UseCase) -> Done:
    """One round for a use case; what it did."""
    with closing(wiring.broker(settings)) as broker, closing(wiring.feature_store(settings, use_case)) as store:
        done = keep_house(settings, use_case, broker, store, time.time())
        done.versions = keep_registry(settings, use_case, broker, wiring.registry(settings), time.time())
        return done


def keep_house(settings: Settings, use_case: UseCase, broker: Broker, store: FeatureStore, now: float) -> Done:
    """now : epoch seconds, by the clock that dates files"""
    done = Done()
    watermark = watermark_of(broker, f"{use_case.name}.featurizer")
    if watermark is None:
        return done
    parts = partitions(settings.state_url, use_case.name, broker)
    for part in parts:
        for view in use_case.views:
            if settings.offline_keep_days:
                done.shortened += part.retain(view, watermark - settings.offline_keep_days * DAY)
            done.merged += part.merge(view.name)
            done.deleted += part.remove(view.name, now - GRACE_S)
    done.forgotten = store.forget(watermark - DAY)
    done.backfills = forget_backfills(settings, use_case, broker, parts)
    return done


def forget_backfills(settings: Settings, use_case: UseCase, broker: Broker, parts: Sequence[Partition]) -> int:
    """Remove the backfills of views that the featurizer serves as they are defined now; returns how many."""
    defined, waiting = Plan.of(Featurizer(use_case)).parts, unserved_views(broker, use_case.topic("featurizer"))
    views = [v.name for v in use_case.views if v.name not in waiting]
    taken = [view for view in views if all(part.defined.get(view) == defined[view] for part in parts)]
    return sum(forget(broker, use_case, settings.state_url, view) for view in taken)


def keep_registry(settings: Settings, use_case: UseCase, broker: Broker, registry: Registry, now: float) -> int:
    """Remove the versions that are older than `registry_keep_days` and never served; returns how many.

    Those of the newest cut stay: without them the cut would be trained for again.
    """
    with closing(Newest(broker, use_case.topic("models"))) as models:
        served = (models.read().get(STATE_KEY) or {}).get("versions", {})
    versions = registry.versions(use_case.name)
    newest = max((int(v.tags["cut"]) for v in versions if v.tags.get("cut") and "refresh_of" not in v.tags), default=0)
    before = now * 1000 - settings.registry_keep_days * DAY
    idle = [v for v in versions if v.version not in served and v.tags.get("role") not in SERVED and v.created < before]
    dead = [v for v in idle if "refresh_of" in v.tags or v.tags.get("cut") != str(newest)]
    for version in dead:
        registry.delete(use_case.name, version.version)
    return len(dead)
