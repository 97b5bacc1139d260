"""Events in columns: fields extracted once per batch, text as codes, summed numbers as whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.contracts import Contract
from features.errors import ConfigError
from features.json_events import Bytes
from features.kernel import FLOAT, INTEGER, NULL, TEXT, Ints, enter, look_up
from features.texts import NONE, UNKNOWN, Texts, cut, encoded
from features.values import Values
from features.windows import RAW, SCALED, as_ordered, is_null

Columns = dict[str, NDArray[Any]]
Udf = Callable[[Columns], Columns]
LARGEST = 2**40  # of a summed number, scaled: eight million of them in one window can't overflow
SWEEP_AT = 65_536


class Coder:
    """Values as small integers: whole numbers and texts through tables that compiled code reads, what else there is
    through a dictionary. Codes that nothing refers to any more are given out again.
    """

    def __init__(self) -> None:
        self.values_of = np.full(1024, None, object)  # never full: the last one, read by code -1, is None
        self.used = 0
        self.free: list[int] = []
        self.sweep_at = SWEEP_AT
        self._index()

    def __len__(self) -> int:
        return self.used - len(self.free)

    def encode(self, values: Sequence[Any]) -> Ints:
        """[n] codes; -1 for None."""
        there = [i for i, value in enumerate(values) if value is not None]
        if len(there) < len(values):
            codes = np.full(len(values), NONE)
            codes[there] = self.encode([values[i] for i in there])
            return codes
        kinds = set(map(type, values))
        if kinds <= {str}:
            return self.encode_texts(*encoded(values))
        if kinds <= {int, bool}:
            return self.encode_integers(np.array(values, np.int64))
        return np.array([self._encode(value) for value in values], np.int64)

    def _encode(self, value: Any) -> int:
        if isinstance(value, str):
            return int(self.encode([value])[0])
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(self.encode([int(value)])[0])
        if value not in self.others:
            self.others[value] = int(self._given([value])[0])
        return self.others[value]

    def encode_integers(self, values: Ints) -> Ints:
        """The same for integers."""
        codes = np.empty(len(values), np.int64)
        look_up(self.integers, values, codes)
        unknown = codes < 0
        if unknown.any():
            new, which = np.unique(values[unknown], return_inverse=True)
            given = self._given(new)
            self.whole += len(new)
            if 2 * self.whole > len(self.integers):
                self._index()
            enter(self.integers, new, given)
            codes[unknown] = given[which]
        return codes

    def encode_texts(self, data: Bytes, starts: Ints, ends: Ints) -> Ints:
        """The same for texts that lie in bytes; NULL for a start is null."""
        codes = self.texts.look_up(data, starts, ends)
        if len(unknown := np.flatnonzero(codes == UNKNOWN)):
            span = data, starts[unknown], ends[unknown]
            codes[unknown], new = self.texts.enter(*span, self._next(len(unknown)))
            self._given(cut(data, span[1][new], span[2][new]))
        return codes

    def _next(self, count: int) -> Ints:
        """The codes that will be given out next."""
        free = self.free[: -count - 1 : -1]
        return np.array([*free, *range(self.used, self.used + count - len(free))], np.int64)

    def _given(self, values: Any) -> Ints:
        """Give out codes to values that have none."""
        codes = self._next(len(values))
        fresh = max(0, len(values) - len(self.free))
        del self.free[len(self.free) - (len(values) - fresh) :]
        self.used += fresh
        if self.used >= len(self.values_of):
            self.values_of = np.concatenate([self.values_of, np.full(self.used, None, object)])
        self.values_of[codes] = values
        return codes

    def _index(self) -> None:
        """Make the tables anew."""
        values = self.values_of[: self.used]
        kinds = np.fromiter(map(id, map(type, values)), np.int64, self.used)
        whole, texts = (np.flatnonzero(kinds == id(kind)) for kind in (int, str))
        self.whole = len(whole)
        self.integers = np.full((1 << (4 * self.whole + 15).bit_length(), 2), -1, np.int64)
        enter(self.integers, values[whole].astype(np.int64), whole)
        self.texts = Texts()
        self.texts.enter(*encoded(values[texts]), texts)
        others = np.flatnonzero((kinds != id(int)) & (kinds != id(str)) & (kinds != id(NoneType)))
        self.others = {values[code]: code for code in others.tolist()}

    def decode(self, codes: Ints) -> NDArray[Any]:
        """What the codes stand for; -1 and NULL are None."""
        return np.asarray(self.values_of[np.maximum(codes, -1)])

    @property
    def full(self) -> bool:
        """Whether it has doubled since the last sweep."""
        return len(self) >= self.sweep_at

    def sweep(self, used: Iterable[Ints]) -> None:
        """Forget every value whose code is not among `used`."""
        gone = np.ones(self.used, bool)
        gone[self.free] = False
        for codes in used:
            gone[codes[codes >= 0]] = False
        if gone.any():
            self.free += np.flatnonzero(gone).tolist()
            self.values_of[: self.used][gone] = None
            self._index()
        self.sweep_at = max(SWEEP_AT, 2 * len(self))

    def snapshot(self) -> list[Any]:
        return [self.values_of[: self.used].tolist(), self.free]

    def restore(self, data: Sequence[Any]) -> None:
        self.__init__()  # type: ignore[misc]
        values, self.free = data
        self.used = len(values)
        self.values_of = np.full(2 * self.used + 1024, None, object)
        self.values_of[: self.used] = values
        self._index()


class Source(Columns):
    """The events of one contract as columns, each made when it is first asked for."""

    def __init__(self, contract: Contract, values: Values) -> None:
        super().__init__()
        self.contract, self.carried = contract, values

    def __missing__(self, name: str) -> NDArray[Any]:
        if name not in self.contract.names:
            raise ConfigError(f"no column {name!r}: contract {self.contract.name} has {self.contract.names}")
        self[name] = made = self.carried.column(self.contract.field(name))
        return made

    def whole(self, name: str) -> bool:
        """Whether a field is always an integer."""
        return any(f.name == name and f.type in (int, "time") and not f.optional for f in self.contract.fields)

    def is_text(self, name: str) -> bool:
        """Whether a field is text, whose codes are had without its values."""
        return any(f.name == name and f.type is str for f in self.contract.fields)


class Prepared:
    """The columns of one batch as the kernel takes them; what several views share is made once."""

    def __init__(self, source: Source, udf: Udf | None, coder: Coder, decimals: Mapping[str, int]) -> None:
        self.source, self.coder, self.decimals = source, coder, decimals
        self.derived = {name: np.asarray(c) for name, c in udf(source).items()} if udf else {}
        self._made: dict[tuple[str, str], Ints] = {}
        self.refused: dict[int, str] = {}

    def column(self, name: str) -> NDArray[Any]:
        found = self.derived.get(name)
        return self.source[name] if found is None else found

    def codes(self, name: str) -> Ints:
        """A column's values as codes."""
        return self._once(name, "codes", self._codes)

    def _codes(self, name: str) -> Ints:
        if name in self.derived or self.source.whole(name):
            column = self.column(name)
            if column.dtype == np.int64:
                return self.coder.encode_integers(column)
            return self.coder.encode(column.tolist())
        if (span := self.source.carried.texts(name)) is not None:
            return self.coder.encode_texts(*span)
        return self.coder.encode(self.source.carried.plain(name))

    def matrix(self, names: tuple[str, ...]) -> Ints:
        """[n, keys] the codes of several columns."""
        if not names:
            return np.zeros((len(self.source.carried), 0), np.int64)
        return np.stack([self.codes(name) for name in names], axis=1)

    def read(self, name: str, mode: str) -> Ints:
        """A column as integers with NULL for null: scaled, raw, or only whether it is there."""
        return self._once(name, mode, {RAW: self._raw, SCALED: self._scaled}.get(mode, self._there))

    def _once(self, name: str, mode: str, make: Callable[[str], Ints]) -> Ints:
        made = self._made.get((name, mode))
        if made is None:
            made = self._made[name, mode] = make(name)
        return made

    def _is_text(self, name: str) -> bool:
        return name not in self.derived and self.source.is_text(name)

    def _raw(self, name: str) -> Ints:
        if self._is_text(name):
            return np.where(self.codes(name) < 0, NULL, self.codes(name))
        raw = self.column(name)
        kind = kind_of(raw)
        if kind == INTEGER:
            return raw.astype(np.int64)
        if kind == FLOAT:
            return np.where(np.isnan(raw), NULL, as_ordered(raw.astype(np.float64)))
        codes = self.coder.encode(raw.tolist())
        return np.where(codes < 0, NULL, codes)

    def _there(self, name: str) -> Ints:
        nulls = self.codes(name) < 0 if self._is_text(name) else is_null(self.column(name))
        return np.where(nulls, NULL, 0)

    def _scaled(self, name: str) -> Ints:
        """Whole numbers. An event whose value is too large, or not whole when scaled, is refused."""
        raw = self.column(name)
        if raw.dtype == object:
            raw = np.array([np.nan if v is None else v for v in raw], np.float64)
        scale = 10 ** self.decimals.get(name, 0)
        if raw.dtype.kind != "f":
            whole = raw.astype(np.int64) if scale == 1 else raw.astype(np.int64) * scale
            bad = np.abs(whole) >= LARGEST
            null = bad
        else:
            scaled = raw * scale
            rounded = np.rint(scaled)
            null = np.isnan(raw)
            bad = ~null & ~(np.abs(rounded) < LARGEST)
            if name not in self.decimals:
                bad |= ~null & (rounded != scaled)
            null = null | bad
            whole = np.where(null, 0, rounded).astype(np.int64)
        for i in np.flatnonzero(bad).tolist():
            self.refused[i] = f"{name} = {raw[i]!r} can't be summed: too large, or a fraction without `decimals`"
        return np.where(null, NULL, whole) if null.any() else whole


def kind_of(raw: NDArray[Any]) -> int:
    """INTEGER, FLOAT or TEXT."""
    return {"i": INTEGER, "u": INTEGER, "b": INTEGER, "f": FLOAT}.get(raw.dtype.kind, TEXT)
