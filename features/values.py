"""What the events of one contract carry: as structs, or read straight into columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.contracts import Contract, Field, Invalid
from features.json_events import BOOL, MOST_FIELDS, TIME, Cells, Layout, read_objects
from features.kernel import FLOAT, INTEGER, NULL, TEXT, Ints
from features.texts import Span, cut, encoded, ends_of

KINDS = {str: TEXT, int: INTEGER, float: FLOAT, "time": TIME, bool: BOOL}


class Structs:
    """Values as structs: of contracts with free JSON, and of events that were decoded elsewhere."""

    def __init__(self, structs: Sequence[Any]) -> None:
        self._structs = structs

    def __len__(self) -> int:
        return len(self._structs)

    def take(self, rows: Ints) -> Structs:
        """Those of these rows."""
        return Structs([self._structs[i] for i in rows.tolist()])

    def joined(self, other: Any) -> Structs:
        """These and others."""
        return Structs([*self._structs, *other._structs])

    def structs(self) -> Sequence[Any]:
        """One by one."""
        return self._structs

    def plain(self, name: str) -> list[Any]:
        """A field's values, None for null."""
        return list(map(attrgetter(name), self._structs))

    def column(self, field: Field) -> NDArray[Any]:
        """A field as an array: int64, float64 with NaN for null, or objects with None."""
        return column(self.plain(field.name), field.type, field.optional)

    def texts(self, name: str) -> Span | None:
        """Where the texts of a field are, if it is known."""
        return None


class Parsed:
    """Values in columns; a struct is only made of what is asked for one by one.

    raws : [n] the records
    texts : [n] the bytes in which a value's texts lie: its record, or what its record's texts stand for
    cells, until : [fields, n] as `json_events.Cells` has them
    """

    def __init__(
        self, contract: Contract, raws: Sequence[bytes], texts: Sequence[bytes], cells: Ints, until: Ints
    ) -> None:
        self.contract, self.raws, self._texts, self._cells, self._until = contract, raws, texts, cells, until
        self._joined: tuple[bytes, Ints] | None = None

    def __len__(self) -> int:
        return len(self.raws)

    def take(self, rows: Ints) -> Parsed:
        """Those of these rows."""
        if (part := _as_slice(rows)) is not None:
            of_part = self.raws[part], self._texts[part], self._cells[:, part], self._until[:, part]
            return self if len(rows) == len(self) else Parsed(self.contract, *of_part)
        chosen = rows.tolist()
        raws, texts = ([of[i] for i in chosen] for of in (self.raws, self._texts))
        return Parsed(self.contract, raws, texts, self._cells[:, rows], self._until[:, rows])

    def joined(self, other: Any) -> Parsed:
        """These and others."""
        cells, until = (np.concatenate(c, axis=1) for c in ((self._cells, other._cells), (self._until, other._until)))
        return Parsed(self.contract, [*self.raws, *other.raws], [*self._texts, *other._texts], cells, until)

    def structs(self) -> Sequence[Any]:
        """One by one."""
        return self.contract.decode_many(self.raws)

    def _field(self, name: str) -> tuple[Field, Ints]:
        i = self.contract.names.index(name)
        return self.contract.fields[i], self._cells[i]

    def _blob(self) -> tuple[bytes, Ints]:
        """All texts one after the other, and where each event's begin."""
        if self._joined is None:
            self._joined = b"".join(self._texts), np.append(0, ends_of(self._texts)[:-1])
        return self._joined

    def plain(self, name: str) -> list[Any]:
        """A field's values, None for null."""
        if (span := self.texts(name)) is not None:
            return cut(*span)
        field, cells = self._field(name)
        if field.type is float:
            return [None if v != v else v for v in cells.view(np.float64).tolist()]
        return [None if v == NULL else v for v in cells.tolist()]

    def column(self, field: Field) -> NDArray[Any]:
        """A field as an array: int64, float64 with NaN for null, or objects with None."""
        if field.type is str:
            return column(self.plain(field.name), str, field.optional)
        _, cells = self._field(field.name)
        if field.type is float:
            return cells.view(np.float64)
        return np.where(cells == NULL, np.nan, cells) if field.optional else cells

    def texts(self, name: str) -> Span | None:
        """The bytes in which the texts of a field lie, and where each begins (NULL: null) and ends; None for others."""
        i = self.contract.names.index(name)
        if self.contract.fields[i].type is not str:
            return None
        blob, begins = self._blob()
        starts = np.where(self._cells[i] == NULL, NULL, self._cells[i] + begins)
        return np.frombuffer(blob, np.uint8), starts, self._until[i] + begins


Values = Structs | Parsed


class Read(NamedTuple):
    """What was read of records: their values, those of `bad` ones being none, and how many carry unknown fields."""

    values: Values
    bad: dict[int, Invalid]
    unknown: int


def read_values(contract: Contract, raws: Sequence[bytes | None]) -> Read:
    """The values of a contract's records; each is read, or refused, as `Contract.decode` has it."""
    form = layout(contract)
    if form is not None:
        return _in_columns(contract, form, raws)
    structs = contract.decode_many(raws)
    bad = {i: value for i, value in enumerate(structs) if isinstance(value, Invalid)}
    valid = [raw for i, raw in enumerate(raws) if raw and i not in bad]
    return Read(Structs(structs), bad, contract.unknown(valid) if contract.unknown(valid[:1]) else 0)


def _in_columns(contract: Contract, form: Layout, raws: Sequence[bytes | None]) -> Read:
    """What the compiled reader leaves is decoded one by one, and entered."""
    given = [raw or b"" for raw in raws]
    blob, ends = b"".join(given), ends_of(given)
    cells = Cells.empty(len(contract.fields), len(given))
    fine = np.zeros(len(given), bool)
    if _is_utf8(blob):
        read_objects(np.frombuffer(blob, np.uint8), ends, form, cells, fine)
        fine &= np.diff(ends, prepend=0) <= contract.max_bytes
    texts, bad, unknown = list(given), dict[int, Invalid](), 0
    left = np.flatnonzero(~fine).tolist()
    for i, value in zip(left, contract.decode_many([raws[i] for i in left]), strict=True):
        if isinstance(value, Invalid):
            bad[i] = value
        else:
            texts[i] = _enter(contract, value, cells.integers[:, i], cells.until[:, i])
            unknown += contract.unknown([given[i]])
    return Read(Parsed(contract, given, texts, cells.integers, cells.until), bad, unknown)


@lru_cache
def layout(contract: Contract) -> Layout | None:
    """How its records are read into columns; None when they can't be."""
    kinds = [KINDS.get(f.type) for f in contract.fields]
    if contract.partial or None in kinds or len(kinds) > MOST_FIELDS:
        return None
    return Layout.of(contract.names, [k for k in kinds if k is not None], [f.optional for f in contract.fields])


def _enter(contract: Contract, value: Any, cells: Ints, until: Ints) -> bytes:
    """Put a struct's values into its cells; returns its texts."""
    texts = b""
    for i, f in enumerate(contract.fields):
        given = getattr(value, f.name)
        if f.type is float:
            cells[i] = np.float64(np.nan if given is None else given).view(np.int64)
        elif given is None:
            cells[i] = NULL
        elif f.type is str:
            cells[i] = len(texts)
            texts += given.encode()
            until[i] = len(texts)
        else:
            cells[i] = given
    return texts


def _as_slice(rows: Ints) -> slice | None:
    """Rows that follow one another, as a slice."""
    return slice(rows[0], rows[-1] + 1) if len(rows) and (np.diff(rows) == 1).all() else None


def _is_utf8(blob: bytes) -> bool:
    """Whether it is UTF-8."""
    if blob.isascii():
        return True
    try:
        blob.decode()
    except UnicodeDecodeError:
        return False
    return True


def span_of(values: Values, name: str) -> Span:
    """The texts of a field, or what its values are as text."""
    return values.texts(name) or encoded(values.plain(name))


def column(values: list[Any], kind: Any, optional: bool) -> NDArray[Any]:
    """Values of one field as an array: int64, float64 with NaN for null, or objects with None."""
    if kind in (int, bool, "time", float):
        if not optional:
            return np.array(values, np.float64 if kind is float else np.int64)
        return np.array([np.nan if v is None else v for v in values], np.float64)
    out = np.empty(len(values), object)
    out[:] = values
    return out
