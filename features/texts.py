"""Texts found by their bytes, so that one met before is never made an object: a hash table of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from features.json_events import Bytes
from features.kernel import NULL, Ints, compiled

Span = tuple[Bytes, Ints, Ints]  # where texts lie: in which bytes, where each starts (NULL: null) and ends
NONE, UNKNOWN = -1, -2
HASH, NUMBER, START, END = range(4)  # an entry; a free one has the number -1


@compiled
def hash_of(data: Bytes, start: int, end: int) -> Any:
    """A text's hash: eight bytes at a time, as FNV-1a takes one."""
    mixed, at = np.int64(end - start), start
    while at + 8 <= end:
        word = np.int64(0)
        for i in range(8):
            word |= np.int64(data[at + i]) << 8 * i
        mixed = (mixed ^ word) * -7046029254386353131
        mixed ^= mixed >> 29
        at += 8
    while at < end:
        mixed = (mixed ^ data[at]) * 1099511628211
        at += 1
    return mixed ^ mixed >> 32


@compiled
def place_of(table: Ints, kept: Bytes, data: Bytes, start: int, end: int, mixed: int) -> Any:
    """Where a text of this hash is in the table, or would be; the hash is left there."""
    place = mixed & (len(table) - 1)
    while table[place, NUMBER] >= 0:
        begins = table[place, START]
        if table[place, HASH] == mixed and table[place, END] - begins == end - start:
            at = start
            while at < end and kept[begins + at - start] == data[at]:
                at += 1
            if at == end:
                return place
        place = (place + 1) & (len(table) - 1)
    table[place, HASH] = mixed
    return place


@compiled
def put(table: Ints, kept: Bytes, used: int, place: int, data: Bytes, start: int, end: int, number: int) -> int:
    """Put a text and its number at its place; returns how many bytes are kept then."""
    if table[place, NUMBER] < 0:
        table[place, START], table[place, END] = used, used + end - start
        for at in range(start, end):
            kept[used] = data[at]
            used += 1
    table[place, NUMBER] = number
    return used


@compiled
def _look_up(table: Ints, kept: Bytes, data: Bytes, starts: Ints, ends: Ints, numbers: Ints) -> int:
    """In passes, so that the memory's answers overlap; returns what was touched, so that it is."""
    touched = 0
    for i in range(len(starts)):
        numbers[i] = 0 if starts[i] == NULL else hash_of(data, starts[i], ends[i])
        touched ^= table[numbers[i] & (len(table) - 1), START]
    for i in range(len(starts)):
        touched ^= kept[max(0, table[numbers[i] & (len(table) - 1), START])]
    for i in range(len(starts)):
        if starts[i] == NULL:
            numbers[i] = NONE
        else:
            number = table[place_of(table, kept, data, starts[i], ends[i], numbers[i]), NUMBER]
            numbers[i] = number if number >= 0 else UNKNOWN
    return touched


@compiled
def _enter_all(
    table: Ints, kept: Bytes, used: int, data: Bytes, starts: Ints, ends: Ints, given: Ints, numbers: Ints, new: Ints
) -> tuple[int, int]:
    count = 0
    for i in range(len(starts)):
        place = place_of(table, kept, data, starts[i], ends[i], hash_of(data, starts[i], ends[i]))
        if table[place, NUMBER] < 0:
            used = put(table, kept, used, place, data, starts[i], ends[i], given[count])
            new[count] = i
            count += 1
        numbers[i] = table[place, NUMBER]
    return used, count


@compiled
def _rehash(old: Ints, table: Ints) -> None:
    for i in range(len(old)):
        if old[i, NUMBER] >= 0:
            place = old[i, HASH] & (len(table) - 1)
            while table[place, NUMBER] >= 0:
                place = (place + 1) & (len(table) - 1)
            for j in range(4):
                table[place, j] = old[i, j]


class Texts:
    """Texts and a number of each, 0 or more. Texts lie in bytes: where each starts, NULL for null, and ends."""

    def __init__(self, size: int = 1024) -> None:
        self.table = np.full((size, 4), -1, np.int64)
        self.kept = np.empty(16 * size, np.uint8)
        self.used = self.entered = 0

    def look_up(self, data: Bytes, starts: Ints, ends: Ints) -> Ints:
        """[n] the numbers, NONE for null or UNKNOWN."""
        numbers = np.empty(len(starts), np.int64)
        _look_up(self.table, self.kept, data, starts, ends, numbers)
        return numbers

    def enter(self, data: Bytes, starts: Ints, ends: Ints, given: Ints) -> tuple[Ints, Ints]:
        """Enter those that are not there, none of them null, with the next of the given numbers each.

        Returns
        -------
        [n] the numbers of all; which were new
        """
        self.make_room(len(starts), int((ends - starts).sum()))
        numbers, new = np.empty((2, len(starts)), np.int64)
        self.used, count = _enter_all(self.table, self.kept, self.used, data, starts, ends, given, numbers, new)
        self.entered -= len(starts) - count
        return numbers, new[:count]

    def make_room(self, count: int, length: int) -> None:
        """For so many more texts, and their bytes."""
        self.entered += count
        if 2 * self.entered > len(self.table):
            old, self.table = self.table, np.full((1 << (2 * self.entered).bit_length(), 4), -1, np.int64)
            _rehash(old, self.table)
        if self.used + length > len(self.kept):
            self.kept = np.concatenate([self.kept[: self.used], np.empty(self.used + length, np.uint8)])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        kept = self.kept[: self.used].tobytes()
        for _, number, start, end in self.table[self.table[:, NUMBER] >= 0].tolist():
            yield kept[start:end].decode(), number


def ends_of(parts: Sequence[bytes | str]) -> Ints:
    """Where each ends when they lie one after the other."""
    return np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))


def encoded(values: Iterable[object]) -> Span:
    """Values as texts, none of them null."""
    texts = list(map(str, values))
    blob = "".join(texts)
    ends = ends_of(texts if blob.isascii() else [text.encode() for text in texts])
    return np.frombuffer(blob.encode(), np.uint8), np.append(0, ends)[:-1], ends


def cut(data: Bytes, starts: Ints, ends: Ints) -> list[str | None]:
    """The texts of a span."""
    blob = data.tobytes()
    places = zip(starts.tolist(), ends.tolist(), strict=True)
    if blob.isascii():
        text = blob.decode()
        return [None if a == NULL else text[a:b] for a, b in places]
    return [None if a == NULL else blob[a:b].decode() for a, b in places]
