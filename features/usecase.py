"""A use case: everything Penstock knows of one prediction problem, declared in one module.

`features/<name>.py` sets `use_case = UseCase(...)`; every process loads it by name.
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from features.contracts import Contract, by_topic
from features.errors import ConfigError

if TYPE_CHECKING:
    from feast import FeatureService, OnDemandFeatureView, StreamFeatureView

    from features.timers import TimerRule

Row = dict[str, Any]


@dataclass(frozen=True)
class Label:
    """Where the truth comes from.

    event : name of the contract that carries it
    key : its field that equals the prediction's request id
    value : struct -> 0.0 .. 1.0, or None when this event settles nothing
    wait : how long after the prediction's event time it may come
    on_expiry : None drops a prediction without a label; a number is the label then ("no click is 0")
    targets : name -> struct -> 0.0 .. 1.0, or None: more that the same event settles (how late, not just whether).
        A model learns to foretell it beside the label, which makes more of few examples, and never answers with it
    """

    event: str
    key: str
    value: Callable[[Any], float | None]
    wait: timedelta
    on_expiry: float | None = None
    targets: Mapping[str, Callable[[Any], float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Category:
    """A model input that is an id: hashed into `buckets` rows of a table of `dim` numbers, so that an id never
    seen before works at once and memory stays bounded."""

    name: str
    buckets: int
    dim: int


@dataclass(frozen=True)
class EventSequence:
    """A model input that is a row's last events, none to many: `columns` are features that are lists of numbers, oldest
    first, and equally long."""

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class ModelInputs:
    """Which features of the vector a model reads, and how."""

    numbers: tuple[str, ...]
    categories: tuple[Category, ...] = ()
    sequences: tuple[EventSequence, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The declaration as a version carries it."""
        return {
            "numbers": list(self.numbers),
            "categories": [{"name": c.name, "buckets": c.buckets, "dim": c.dim} for c in self.categories],
            "sequences": [{"name": s.name, "columns": list(s.columns)} for s in self.sequences],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelInputs:
        sequences = (EventSequence(s["name"], tuple(s["columns"])) for s in data.get("sequences", ()))
        return cls(tuple(data["numbers"]), tuple(Category(**c) for c in data["categories"]), tuple(sequences))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every feature that is read, each once: the numbers, then what else there is."""
        lists = (column for s in self.sequences for column in s.columns)
        return tuple(dict.fromkeys((*self.numbers, *(c.name for c in self.categories), *lists)))

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each of `columns` stands among them."""
        return {name: place for place, name in enumerate(self.columns)}


@dataclass(frozen=True)
class UseCase:
    """One prediction problem.

    contracts : every event it reads
    request : the contract of a scoring request: `request_id`, `event_time`, entity keys and request fields
    entities : fields of the request that are entity keys; the other ones are request fields
    derive : request fields -> more entity keys (a time bucket, say); pure
    views, on_demand, service : the Feast objects
    timers : view name -> rule that makes the view's events from time passing
    prior : the answer before the first model version
    partition_key, partitions : the field that every event and request carries, and into how many partitions its value
        divides them: each partition has its own state. One partition needs no key
    retrain_every : cuts are at multiples of it since the epoch
    min_examples : the first version waits for so many
    file_every : offline and archive files close at multiples of it
    """

    name: str
    contracts: tuple[Contract, ...]
    request: Contract
    entities: tuple[str, ...]
    views: tuple[StreamFeatureView, ...]
    on_demand: tuple[OnDemandFeatureView, ...]
    service: FeatureService
    label: Label
    inputs: ModelInputs
    prior: float
    derive: Callable[[Row], Row] = lambda row: {}
    timers: Mapping[str, TimerRule] = field(default_factory=dict)
    partition_key: str | None = None
    partitions: int = 1
    retrain_every: timedelta = timedelta(days=7)
    min_examples: int = 2000
    file_every: timedelta = timedelta(hours=1)

    def topic(self, name: str) -> str:
        """`<uc>.<name>`: the topic of one of the system's own records."""
        return f"{self.name}.{name}"

    @property
    def event_topics(self) -> dict[str, Contract]:
        return by_topic(self.contracts, self.name)

    def contract(self, name: str) -> Contract:
        return next(c for c in self.contracts if c.name == name)

    def check(self) -> UseCase:
        """This use case, or ConfigError naming what to mend."""
        known = {c.name for c in self.contracts}
        if self.label.event not in known:
            raise ConfigError(f"{self.name}: label.event {self.label.event!r} is none of the contracts {sorted(known)}")
        names = [*(f.name for view in (*self.views, *self.on_demand) for f in view.features), *self.label.targets]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(f"{self.name}: names of features and targets must be unique, these are not: {twice}")
        if not 0 < self.prior < 1:
            raise ConfigError(f"{self.name}: prior must lie between 0 and 1, got {self.prior}")
        self._check_partitions()
        return self

    def partition(self, value: Any) -> int:
        """The partition of a value of the partition key: the CRC-32 of its text in UTF-8 modulo the count, which is
        what librdkafka's default partitioner makes of a record key with that text."""
        return zlib.crc32(str(value).encode()) % self.partitions

    def partition_of(self, row: Mapping[str, Any]) -> int:
        """The partition of an event or request by its fields."""
        return self.partition(row[self.partition_key]) if self.partition_key and self.partitions > 1 else 0

    def _check_partitions(self) -> None:
        key, count = self.partition_key, self.partitions
        if count < 1:
            raise ConfigError(f"{self.name}: partitions must be 1 or more, got {count}")
        if count == 1:
            return
        if key is None:
            raise ConfigError(f"{self.name}: {count} partitions need a partition_key, a field of every event")
        if lacking := [c.name for c in (*self.contracts, self.request) if key not in c.required]:
            raise ConfigError(f"{self.name}: partition_key {key!r} must be a required field of {', '.join(lacking)}")
        if across := [view.name for view in self.views if key not in view.entities]:
            raise ConfigError(
                f"{self.name}: {count} partitions split what these views count together: {', '.join(across)}; "
                f"give them the entity {key!r}, or the use case partitions=1"
            )


def load(name: str) -> UseCase:
    """The use case that `features/<name>.py` declares."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"use case {name!r}: a name has lower-case letters, digits and _ only")
    try:
        module = importlib.import_module(f"features.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"features.{name}":
            raise
        raise ConfigError(f"no use case {name!r}: write features/{name}.py (the README shows how)") from None
    use_case = getattr(module, "use_case", None)
    if not isinstance(use_case, UseCase):
        raise ConfigError(f"features/{name}.py declares no `use_case = UseCase(...)`")
    return use_case.check()
