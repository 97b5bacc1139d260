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

from features.kernel import NULL, Ints, compiled, inlined

Bytes = NDArray[np.uint8]
TEXT, INTEGER, FLOAT, TIME, BOOL = range(5)
MOST_FIELDS = 62  # bits of an integer that notes which were met
MAX_TIME = 253_402_300_800_000  # epoch ms of the year 10000
QUOTE, ESCAPE, COMMA, COLON, OPEN, CLOSE, MINUS, PLUS, POINT = b'"\\,:{}-+.'
ZERO, NINE, LETTER_T, LETTER_Z, E_LARGE, E_SMALL = b"09TZEe"
POWERS = 10.0 ** np.arange(23)  # all exact


class Layout(NamedTuple):
    """A contract's fields: their names one after the other, where each ends, TEXT to BOOL, and the bits of those that
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


@compiled
def _read(
    data: Bytes, begin: int, end: int, layout: Layout, cells: Ints, until: Ints, floats: NDArray[np.float64], i: int
) -> bool:
    """One object into column i; False when it is left to another reader."""
    at = _blank(data, begin, end)
    if at >= end or data[at] != OPEN:
        return False
    at, met, field = _blank(data, at + 1, end), 0, -1
    while True:
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
        if at >= end:
            return False
        kind = layout.kinds[field]
        if data[at] == QUOTE:
            stop = _text_end(data, at + 1, end)
            if stop >= end:
                return False
            if kind == TEXT:
                cells[field, i], until[field, i] = at + 1 - begin, stop - begin
            elif kind == TIME:
                cells[field, i] = _time(data, at + 1, stop)
                if cells[field, i] < 0:
                    return False
            else:
                return False
            at = stop + 1
        elif _is_word(data, at, end, b"null"):
            if not layout.optional[field]:
                return False
            _leave_out(layout, cells, floats, field, i)
            at += 4
        elif kind == BOOL:
            if _is_word(data, at, end, b"true"):
                cells[field, i], at = 1, at + 4
            elif _is_word(data, at, end, b"false"):
                cells[field, i], at = 0, at + 5
            else:
                return False
        elif kind == TEXT:
            return False
        else:
            number, digits, power, at = _number(data, at, end)
            if kind == FLOAT:
                power = 0 if power == NULL else power
                if not 1 <= digits <= 15 or abs(power) > 22:
                    return False
                floats[field, i] = number * POWERS[power] if power >= 0 else number / POWERS[-power]
            else:
                if not 1 <= digits <= 18 or power != NULL or (kind == TIME and not 0 <= number < MAX_TIME):
                    return False
                cells[field, i] = number
        at = _blank(data, at, end)
        if at >= end:
            return False
        if data[at] == CLOSE:
            break
        if data[at] != COMMA:
            return False
        at = _blank(data, at + 1, end)
    if met & layout.required != layout.required:
        return False
    for field in range(len(layout.kinds)):
        if not met >> field & 1:
            _leave_out(layout, cells, floats, field, i)
    return _blank(data, at + 1, end) == end


@inlined
def _leave_out(layout: Layout, cells: Ints, floats: NDArray[np.float64], field: int, i: int) -> None:
    """A field that is null."""
    if layout.kinds[field] == FLOAT:
        floats[field, i] = np.nan
    else:
        cells[field, i] = NULL


@compiled
def read_objects(
    data: Bytes,
    ends: Ints,
    layout: Layout,
    cells: Ints,
    until: Ints,
    floats: NDArray[np.float64],
    fine: NDArray[np.bool_],
) -> None:
    """Read objects that lie one after the other in UTF-8.

    ends : [n] where each ends in `data`
    cells, until : [fields, n] integers, times in epoch ms, booleans, where texts begin and end in their object; NULL
    floats : the memory of `cells`; NaN for null
    fine : [n] which were read; the others' columns hold anything
    """
    begin = 0
    for i in range(len(ends)):
        fine[i] = _read(data, begin, ends[i], layout, cells, until, floats, i)
        begin = ends[i]
