"""JSON events straight into columns: one compiled pass over all records of a poll, no object for each.

`read_objects` takes only what it reads exactly as msgspec would: flat objects, text without escapes, floats of at most
fifteen digits (exact by Clinger 1990, "How to read floating point numbers accurately"), times in RFC 3339 to the
millisecond. It leaves every other record, good or bad, to msgspec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.contracts import MAX_TIME
from features.kernel import FLOAT, NULL, TEXT, Ints, compiled, inlined

Bytes = NDArray[np.uint8]
TIME, BOOL = 3, 4  # kinds beside the kernel's INTEGER, FLOAT and TEXT
MOST_FIELDS = 62  # bits of an integer that notes which were met
QUOTE, ESCAPE, COMMA, COLON, OPEN, CLOSE, MINUS, PLUS, POINT = b'"\\,:{}-+.'
ZERO, NINE, LETTER_T, LETTER_Z, E_LARGE, E_SMALL = b"09TZEe"
POWERS = 10.0 ** np.arange(23)  # all exact


class Layout(NamedTuple):
    """A contract's fields: their names one after the other, where each ends, their kinds, and the bits of those that
    must be there."""

    names: Bytes
    ends: Ints
    kinds: Ints
    optional: NDArray[np.bool_]
    required: int

    @classmethod
    def of(cls, names: Sequence[str], kinds: Sequence[int], optional: Sequence[bool]) -> Layout:
        encoded = [name.encode() for name in names]
        required = sum(1 << i for i, may_lack in enumerate(optional) if not may_lack)
        return cls(
            np.frombuffer(b"".join(encoded), np.uint8),
            np.cumsum([len(name) for name in encoded], dtype=np.int64),
            np.array(kinds, np.int64),
            np.array(optional, bool),
            required,
        )


class Cells(NamedTuple):
    """What objects hold, by field.

    integers, until : [fields, n] integers, times in epoch ms, booleans, or where texts begin and end in their object;
        NULL for null
    floats : the memory of `integers`; NaN for null
    """

    integers: Ints
    until: Ints
    floats: NDArray[np.float64]

    @classmethod
    def empty(cls, fields: int, n: int) -> Cells:
        integers, until = np.empty((2, fields, n), np.int64)
        return cls(integers, until, integers.view(np.float64))


@inlined
def _blank(data: Bytes, at: int, end: int) -> int:
    """Where the next token begins."""
    while at < end and (data[at] == 32 or 9 <= data[at] <= 10 or data[at] == 13):
        at += 1
    return at


@inlined
def _digits(data: Bytes, at: int, count: int) -> int:
    """The number that so many digits make, -1 when one of them is none."""
    number = 0
    for i in range(at, at + count):
        if not ZERO <= data[i] <= NINE:
            return -1
        number = 10 * number + data[i] - ZERO
    return number


@compiled
def _text_end(data: Bytes, at: int, end: int) -> int:
    """Where the text that begins at `at` has its closing quote; `end` when it has an escape, a control, or none."""
    while at < end and data[at] != QUOTE:
        if data[at] == ESCAPE or data[at] < 32:
            return end
        at += 1
    return at


@compiled
def _next_field(data: Bytes, at: int, end: int, layout: Layout, expected: int) -> tuple[int, int]:
    """Which field has the name that begins there, the expected one at best, and where its quote is; -1 when none has.

    Producers keep an order: comparing comes before looking for the quote.
    """
    count = len(layout.ends)
    for i in range(count):
        field = expected + i
        field = field if field < count else field - count
        start = layout.ends[field - 1] if field else 0
        stop = at + layout.ends[field] - start
        if stop < end and data[stop] == QUOTE:
            j = at
            while j < stop and data[j] == layout.names[start + j - at]:
                j += 1
            if j == stop:
                return field, stop
    return -1, end


@compiled
def _time(data: Bytes, at: int, end: int) -> int:
    """Epoch ms of `2013-01-01T05:15:00.000Z` or with an offset like +01:00; -1 for other forms and times."""
    if end - at < 20 or data[at + 4] != MINUS or data[at + 7] != MINUS or data[at + 10] != LETTER_T:
        return -1
    if data[at + 13] != COLON or data[at + 16] != COLON:
        return -1
    year, month, day = _digits(data, at, 4), _digits(data, at + 5, 2), _digits(data, at + 8, 2)
    hour, minute, second = _digits(data, at + 11, 2), _digits(data, at + 14, 2), _digits(data, at + 17, 2)
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = 30 + (month + month // 8) % 2 if month != 2 else 29 if leap else 28
    if year < 1970 or not 1 <= month <= 12 or not 1 <= day <= days:
        return -1
    if not 0 <= hour <= 23 or not 0 <= minute <= 59 or not 0 <= second <= 59:
        return -1
    at += 19
    ms, scale = 0, 100
    if data[at] == POINT:
        at += 1
        first = at
        while at < end and scale and ZERO <= data[at] <= NINE:
            ms += scale * (data[at] - ZERO)
            scale //= 10
            at += 1
        if at == end or at == first:  # noqa: SIM109 (numba)
            return -1
    offset = 0
    if data[at] != LETTER_Z:
        if end - at != 6 or (data[at] != PLUS and data[at] != MINUS) or data[at + 3] != COLON:
            return -1
        hours, minutes = _digits(data, at + 1, 2), _digits(data, at + 4, 2)
        if not 0 <= hours <= 23 or not 0 <= minutes <= 59:
            return -1
        offset = (60 * hours + minutes) * (1 if data[at] == PLUS else -1)
    elif end - at != 1:
        return -1
    shifted = year - (month <= 2)  # years begin in March, so that a leap day is the last
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    passed = 365 * shifted + shifted // 4 - shifted // 100 + shifted // 400 + of_year - 719_468
    found = (((24 * passed + hour) * 60 + minute - offset) * 60 + second) * 1000 + ms
    return found if 0 <= found < MAX_TIME else -1


@compiled
def _number(data: Bytes, at: int, end: int) -> tuple[int, int, int, int]:
    """A number's digits as an integer with its sign, how many they are, the power of ten, and where it ends; no digits
    when it is malformed. A whole number without point or exponent has NULL for its power."""
    negative = data[at] == MINUS
    if negative:
        at += 1
    number, digits, power = 0, 0, NULL
    first = at
    while at < end and ZERO <= data[at] <= NINE and digits < 19:
        number = 10 * number + data[at] - ZERO
        at, digits = at + 1, digits + 1
    if digits == 0 or (digits > 1 and data[first] == ZERO):
        return 0, 0, 0, at
    if at < end and data[at] == POINT:
        at, whole = at + 1, digits
        while at < end and ZERO <= data[at] <= NINE and digits < 19:
            number = 10 * number + data[at] - ZERO
            at, digits = at + 1, digits + 1
        power = whole - digits
        if not power:
            return 0, 0, 0, at
    if at < end and (data[at] == E_SMALL or data[at] == E_LARGE):
        at += 1
        below = at < end and data[at] == MINUS
        if at < end and (data[at] == MINUS or data[at] == PLUS):
            at += 1
        exponent, first = 0, at
        while at < end and ZERO <= data[at] <= NINE and at - first < 4:
            exponent = 10 * exponent + data[at] - ZERO
            at += 1
        if at == first:
            return 0, 0, 0, at
        power = (0 if power == NULL else power) + (-exponent if below else exponent)
    if negative and number == 0:
        return 0, 0, 0, at  # a float keeps that sign
    return -number if negative else number, digits, power, at


@inlined
def _is_word(data: Bytes, at: int, end: int, word: bytes) -> bool:
    """Whether a word begins there."""
    if end - at < len(word):
        return False
    same = True
    for i in range(len(word)):
        same = same and data[at + i] == word[i]
    return same


@inlined
def _leave_out(layout: Layout, cells: Cells, field: int, i: int) -> None:
    """A field that is null."""
    if layout.kinds[field] == FLOAT:
        cells.floats[field, i] = np.nan
    else:
        cells.integers[field, i] = NULL


@inlined
def _value(data: Bytes, begin: int, at: int, end: int, layout: Layout, field: int, cells: Cells, i: int) -> int:
    """The value at `at` into a field's column; returns where it ends, -1 when it is left to another reader."""
    kind = layout.kinds[field]
    if data[at] == QUOTE:
        stop = _text_end(data, at + 1, end)
        if stop >= end or (kind != TEXT and kind != TIME):
            return -1
        if kind == TEXT:
            cells.integers[field, i], cells.until[field, i] = at + 1 - begin, stop - begin
        else:
            cells.integers[field, i] = _time(data, at + 1, stop)
        return stop + 1 if cells.integers[field, i] >= 0 else -1
    if _is_word(data, at, end, b"null"):
        _leave_out(layout, cells, field, i)
        return at + 4 if layout.optional[field] else -1
    if kind == BOOL:
        cells.integers[field, i] = is_true = _is_word(data, at, end, b"true")
        return at + 4 if is_true else at + 5 if _is_word(data, at, end, b"false") else -1
    if kind == TEXT:
        return -1
    number, digits, power, at = _number(data, at, end)
    if kind == FLOAT:
        power = 0 if power == NULL else power
        if not 1 <= digits <= 15 or abs(power) > 22:
            return -1
        cells.floats[field, i] = number * POWERS[power] if power >= 0 else number / POWERS[-power]
        return at
    if not 1 <= digits <= 18 or power != NULL or (kind == TIME and not 0 <= number < MAX_TIME):
        return -1
    cells.integers[field, i] = number
    return at


@compiled
def _read(data: Bytes, begin: int, end: int, layout: Layout, cells: Cells, i: int) -> bool:
    """One object into column i; False when it is left to another reader."""
    at = _blank(data, begin, end)
    if at >= end or data[at] != OPEN:
        return False
    met, field = 0, -1
    while True:
        at = _blank(data, at + 1, end)
        if at >= end or data[at] != QUOTE:
            return False
        field, stop = _next_field(data, at + 1, end, layout, field + 1)
        if field < 0 or met >> field & 1:
            return False
        met |= 1 << field
        at = _blank(data, stop + 1, end)
        if at >= end or data[at] != COLON:
            return False
        at = _blank(data, at + 1, end)
        at = _value(data, begin, at, end, layout, field, cells, i) if at < end else -1
        if at < 0:
            return False
        at = _blank(data, at, end)
        if at >= end or (data[at] != COMMA and data[at] != CLOSE):
            return False
        if data[at] == CLOSE:
            break
    if met & layout.required != layout.required:
        return False
    for field in range(len(layout.kinds)):
        if not met >> field & 1:
            _leave_out(layout, cells, field, i)
    return _blank(data, at + 1, end) == end


@compiled
def read_objects(data: Bytes, ends: Ints, layout: Layout, cells: Cells, fine: NDArray[np.bool_]) -> None:
    """Read objects that lie one after the other in UTF-8.

    ends : [n] where each ends in `data`
    fine : [n] which were read; the others' cells hold anything
    """
    begin = 0
    for i in range(len(ends)):
        fine[i] = _read(data, begin, ends[i], layout, cells, i)
        begin = ends[i]
