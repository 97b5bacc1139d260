"""The body of `POST /predict`: decoded and checked in one pass against the use case's request contract."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from features.contracts import Contract, Field, Invalid, epoch_ms
from features.errors import InputError
from features.usecase import Row, UseCase
from features.vectors import Vectorizer

MAX_BODY = 1 << 20
MAX_ROWS = 1000
MAX_ID = 256
INT64 = 1 << 63


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of a request; `event_time` in epoch ms, None for now."""

    request_id: str
    entities: Row
    fields: Row
    event_time: int | None


class Answered(msgspec.Struct):
    """The answer to one row: which version gave the score, in which arm, with which refresh of its weights; views
    that read as the empty window, `stale` ones because their row was past its ttl."""

    request_id: str
    score: float
    version: str
    arm: Literal["champion", "canary"]
    refresh: int
    missing: list[str]
    stale: list[str]


class Reply(msgspec.Struct):
    """The body of an answer, in the order of the rows."""

    rows: list[Answered]


class Refused(InputError):
    """A request that can't be answered: the HTTP status and what to say about which row and field."""

    def __init__(self, status: int, message: str, row: int | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.row, self.field = status, row, field

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        where = {"row": self.row, "field": self.field}
        return {"error": {"message": str(self), **{k: v for k, v in where.items() if v is not None}}}


class _Peek(msgspec.Struct):
    rows: msgspec.Raw | UnsetType = UNSET


class RequestDecoder:
    """Decodes bodies for one use case.

    allow_event_time : whether a row may say when it is asked
    new_id : makes the request id of a row that has none
    """

    def __init__(self, use_case: UseCase, allow_event_time: bool, new_id: Callable[[], str]) -> None:
        self._contract, self._new_id, self._allow_event_time = (use_case.request, new_id, allow_event_time)
        vectorizer = Vectorizer(use_case)
        self._checks = {f.name: f for f in use_case.request.fields if f.type in ("time", float, int)}
        self.row_type = row = _row_type(use_case.request, use_case.entities, vectorizer.fields)
        self._peek = msgspec.json.Decoder(_Peek)
        self._one = msgspec.json.Decoder(row)
        self._many = msgspec.json.Decoder(list[row])  # type: ignore[valid-type]

    def decode(self, body: bytes) -> list[Asked]:
        """The rows of a body, `{"rows": [...]}` or one bare row; raises Refused."""
        if len(body) > MAX_BODY:
            raise Refused(413, f"the body is over {MAX_BODY} bytes: send fewer rows")
        try:
            rows = self._peek.decode(body).rows
            found = [self._one.decode(body)] if rows is UNSET else self._many.decode(rows)
        except msgspec.ValidationError as error:
            raise _invalid(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refused(400, f"the body is not valid JSON: {error}") from None
        except RecursionError:
            raise Refused(400, "the body is nested too deeply") from None
        if not found:
            raise Refused(422, "rows is empty: send 1 to 1,000 rows", field="rows")
        if len(found) > MAX_ROWS:
            raise Refused(413, f"{len(found)} rows: send 1,000 at most")
        big = len(body) > self._contract.max_bytes
        return [self._asked(i, row, big) for i, row in enumerate(found)]

    def _asked(self, i: int, row: Any, big: bool) -> Asked:
        if big and len(msgspec.json.encode(row)) > self._contract.max_bytes:
            raise Refused(422, f"the row is over {self._contract.max_bytes} bytes", i)
        if row.request_id == "":
            raise Refused(422, "request_id is empty: leave it out to have one made", i, "request_id")
        entities, fields = (msgspec.structs.asdict(row.entities), msgspec.structs.asdict(row.fields))
        for values in (entities, fields):
            for name in values.keys() & self._checks.keys():
                values[name] = _checked(values[name], self._checks[name], i)
        return Asked(row.request_id or self._new_id(), entities, fields, self._event_time(row.event_time, i))

    def _event_time(self, value: Any, row: int) -> int | None:
        if value is None:
            return None
        if not self._allow_event_time:
            raise Refused(
                400,
                "event_time is not accepted here: the predictor answers as of now; a replay needs the setting "
                "allow_event_time",
                row,
                "event_time",
            )
        return _time(value, "event_time", row)


def _row_type(contract: Contract, entities: tuple[str, ...], fields: tuple[str, ...]) -> type[msgspec.Struct]:
    time = int | Annotated[datetime, msgspec.Meta(tz=True)]

    def part(title: str, names: tuple[str, ...]) -> type[msgspec.Struct]:
        chosen = sorted((f for f in contract.fields if f.name in names), key=lambda f: f.optional)
        kinds = [(f, time if f.type == "time" else f.type) for f in chosen]
        columns = [(f.name, kind | None, None) if f.optional else (f.name, kind) for f, kind in kinds]
        return msgspec.defstruct(title, columns, gc=False)

    def member(title: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        kind = part(title, names)
        needed = any(not f.optional for f in contract.fields if f.name in names)
        return (title, kind) if needed else (title, kind, msgspec.field(default_factory=kind))

    parts = sorted((member("entities", entities), member("fields", fields)), key=len)
    text = Annotated[str, msgspec.Meta(max_length=MAX_ID)]
    return msgspec.defstruct("Row", [*parts, ("request_id", text | None, None), ("event_time", time | None, None)])


def _checked(value: Any, field: Field, row: int) -> Any:
    if value is None:
        return None
    if field.type == "time":
        return _time(value, field.name, row)
    if field.type is float and not math.isfinite(value):
        raise Refused(422, f"{field.name} is not a finite number", row, field.name)
    if field.type is int and not -INT64 <= value < INT64:
        raise Refused(422, f"{field.name} does not fit 64 bits", row, field.name)
    return value


def _time(value: Any, name: str, row: int) -> int:
    try:
        return epoch_ms(value, name)
    except Invalid as error:
        raise Refused(422, error.detail, row, name) from None


def _invalid(message: str) -> Refused:
    """What msgspec found, with the row and the field it found it in."""
    what, _, path = message.partition(" - at `$")
    index = re.match(r"(?:\.rows)?\[(\d+)\]", path)
    missing = re.search(r"missing required field `(\w+)`", what)
    last = re.findall(r"\.(\w+)", path)
    name = missing[1] if missing else last[-1] if last else None
    row = int(index[1]) if index else None
    place = path.rstrip("`").lstrip(".")
    return Refused(422, f"{what} (at {place})" if place else what, row, name)
