"""Event contracts: what a producer promises, checked on every record.

>>> from datetime import timedelta
>>> clicked = Contract("clicked", (Field("id", str), Field("user", str), Field("at", "time")), time="at", id="id")
>>> clicked.decode(b'{"id": "1", "user": "u", "at": "2026-01-01T00:00:00Z"}').at
1767225600000
>>> clicked.decode(b'{"id": "1", "at": 5}')
Traceback (most recent call last):
...
features.contracts.Invalid: invalid: Object missing required field `user`
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Any

import msgspec
import numpy as np

from features.errors import ConfigError, PenstockError

MAX_TIME = 253_402_300_800_000  # epoch ms of the year 10000
INTEGER = Annotated[int, msgspec.Meta(ge=-(2**63) + 1, le=2**63 - 1)]
KINDS: dict[Any, Any] = {int: INTEGER, "time": INTEGER | Annotated[datetime, msgspec.Meta(tz=True)]}

_decode_names = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Invalid(PenstockError):
    """A record that a contract refuses: `reason` goes to the rejected topic, `detail` says what is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Field:
    """One field of an event.

    type : str, int, float, bool, `list`/`dict` for free JSON, or "time" (RFC 3339 with offset, or epoch ms;
        decoded to epoch ms)
    optional : null or absent is allowed
    decimals : of a float: digits after the point that sums keep; they are added as scaled integers, so that a sum
        never drifts. A float without decimals can't be summed.
    """

    name: str
    type: Any
    optional: bool = False
    decimals: int | None = None


@dataclass(frozen=True)
class Contract:
    """What one kind of event looks like, when it happened, and how far its producers may be off.

    time : the field with the event time
    id : the field that makes an event unique within `dedupe`, never null; None: events have no identity
    by_arrival : it counts from its record's timestamp on, whatever its event time
    partial : records have more fields, which this reader doesn't want
    out_of_orderness : how far behind the newest event of its partition an event may be and still be on time
    max_ahead : an event further than this ahead of its record's timestamp is refused (`future`)
    """

    name: str
    fields: tuple[Field, ...]
    time: str
    id: str | None = None
    topic: str = ""
    max_bytes: int = 65_536
    out_of_orderness: timedelta = timedelta(0)
    max_ahead: timedelta = timedelta(minutes=5)
    dedupe: timedelta = timedelta(hours=1)
    version: int = 1
    by_arrival: bool = False
    partial: bool = False

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names):
            raise ConfigError(f"contract {self.name}: field names must be unique, got {names}")
        for what in (self.time, self.id):
            if what is not None and what not in names:
                raise ConfigError(f"contract {self.name}: {what!r} is not one of its fields {names}")
        if self.id is not None and self.field(self.id).optional:
            raise ConfigError(f"contract {self.name}: the id field {self.id!r} can't be optional")
        if self.field(self.time).type != "time":
            raise ConfigError(f"contract {self.name}: the time field {self.time!r} must have type 'time'")

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.fields]

    @property
    def required(self) -> frozenset[str]:
        """Names of the fields that every event has."""
        return frozenset(f.name for f in self.fields if not f.optional)

    def field(self, name: str) -> Field:
        """The field of this name."""
        return next(f for f in self.fields if f.name == name)

    @cached_property
    def struct(self) -> type[msgspec.Struct]:
        """The msgspec type that records decode to; times are checked by `decode`."""

        def kind(f: Field) -> Any:
            t = KINDS.get(f.type, f.type)
            return t | None if f.optional else t

        required = [(f.name, kind(f)) for f in self.fields if not f.optional]
        optional = [(f.name, kind(f), None) for f in self.fields if f.optional]
        return msgspec.defstruct(self.name.title(), [*required, *optional], gc=False)

    @cached_property
    def _decoder(self) -> msgspec.json.Decoder[Any]:
        return msgspec.json.Decoder(self.struct)

    @cached_property
    def _times(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.fields if f.type == "time")

    @cached_property
    def _floats(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.fields if f.type is float)

    def decode(self, raw: bytes | None) -> Any:
        """The struct of one record; raises Invalid with reason `oversized`, `malformed` or `invalid`."""
        if raw is None:
            raise Invalid("malformed", "null value")
        if len(raw) > self.max_bytes:
            raise Invalid("oversized", f"{len(raw)} bytes, the contract allows {self.max_bytes}")
        try:
            value = self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise Invalid("invalid", str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Invalid("malformed", str(error)) from None
        self._settle([value])
        return value

    def decode_many(self, raws: Sequence[bytes | None]) -> list[Any]:
        """What `decode` gives for each record, or the Invalid it raises; in one go when all are well."""
        if all(raw and len(raw) <= self.max_bytes and raw[:1] == b"{" and raw[-1:] == b"}" for raw in raws):
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, Invalid):
                values = self._decoder.decode_lines(b"\n".join(raws))  # type: ignore[arg-type]
                if len(values) == len(raws):  # no value spans two records: none is valid with `}` before `{` inside
                    self._settle(values)
                    return values
        return [self._tried(raw) for raw in raws]

    def unknown(self, raws: Iterable[bytes]) -> int:
        """How many of these valid records carry fields that are not the contract's; they are ignored."""
        return 0 if self.partial else sum(not self._is_known(raw) for raw in raws)

    def _is_known(self, raw: bytes) -> bool:
        try:
            return _decode_names(raw).keys() <= self._names
        except UnicodeDecodeError:
            return False  # a name that isn't text, which decoding passes over

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.names)

    def _tried(self, raw: bytes | None) -> Any:
        try:
            return self.decode(raw)
        except Invalid as invalid:
            return invalid

    def _settle(self, values: Sequence[Any]) -> None:
        """Times as epoch ms, and floats checked, in place; raises Invalid."""
        for name in self._times:
            for value, at in zip(values, _epoch_ms([getattr(value, name) for value in values], name), strict=True):
                setattr(value, name, at)
        for name in self._floats:
            if not all(math.isfinite(getattr(value, name) or 0.0) for value in values):
                raise Invalid("invalid", f"{name} is not a finite number")

    def time_of(self, value: Any) -> int:
        """Event time in epoch ms."""
        return int(getattr(value, self.time))


def _epoch_ms(given: list[Any], name: str) -> list[int | None]:
    """`epoch_ms` of each that is not null."""
    if set(map(type, given)) != {datetime}:
        return [None if at is None else epoch_ms(at, name) for at in given]
    times = np.rint(np.fromiter(map(datetime.timestamp, given), np.float64, len(given)) * 1000).astype(np.int64)
    if times.min() < 0 or times.max() >= MAX_TIME:
        raise Invalid("invalid", f"{name} must lie between 1970 and 9999")
    return list(times.tolist())


def epoch_ms(at: int | datetime, name: str = "time") -> int:
    """Whole milliseconds since the epoch of a decoded time."""
    ms = at if isinstance(at, int) else round(at.timestamp() * 1000)
    if not 0 <= ms < MAX_TIME:
        raise Invalid("invalid", f"{name} must lie between 1970 and 9999, got {at}")
    return ms


def by_topic(contracts: Sequence[Contract], use_case: str) -> dict[str, Contract]:
    """Topic name -> contract; a contract's default topic is `<use case>.<event>`."""
    return {contract.topic or f"{use_case}.{contract.name}": contract for contract in contracts}
