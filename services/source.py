"""What a replay reads: past events and scoring requests of a use case, by event time."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from features.errors import ConfigError

SOURCES = {"flights": "services.timetable", "clicks": "services.clickstream"}


@dataclass(frozen=True, slots=True)
class SourceEvent:
    """One event: `event` is its contract's name, `time` its event time (epoch ms), `value` its JSON."""

    event: str
    time: int
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """One scoring request at `time` (epoch ms); `row` is the body that the predictor and `<uc>.requests` take."""

    id: str
    time: int
    row: dict[str, Any]


class Source(Protocol):
    """A module with these two functions; both ranges are half-open, in epoch ms, and the order deterministic."""

    def events(self, from_ms: int, until_ms: int) -> Sequence[SourceEvent]:
        """Events of the range by (time, event name, id)."""

    def requests(self, from_ms: int, until_ms: int) -> Sequence[Request]:
        """Requests of the range by (time, id)."""


def source_of(use_case: str) -> Source:
    """The source that replays a use case; ConfigError when there is none."""
    if use_case not in SOURCES:
        raise ConfigError(f"no data to replay for {use_case!r}; known are {', '.join(sorted(SOURCES))}")
    return cast(Source, importlib.import_module(SOURCES[use_case]))
