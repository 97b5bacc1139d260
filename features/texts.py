"""Texts found by their bytes, so that one met before is never made an object: a hash table of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from features.json_events import Bytes
from features.kernel import NULL, Ints, compiled

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
def enter(table: Ints, kept: Bytes, used: int, place: int, data: Bytes, start: int, end: int, number: int) -> int:
    """Put a text and its number at its place; returns how many bytes are kept then."""
    if table[place, NUMBER] < 0:
        table[place, START], table[place, END] = used, used + end - start
        for at in range(start, end):
            kept[used] = data[at]
            used += 1
    table[place, NUMBER] = number
    return used


@compiled
def _look_up(table: Ints, kept: Bytes, data: Bytes, starts: Ints, ends: Ints, numbers: Ints) -> None:
    for i in range(len(starts)):
        if starts[i] == NULL:
            numbers[i] = NONE
        else:
            mixed = hash_of(data, starts[i], ends[i])
            number = table[place_of(table, kept, data, starts[i], ends[i], mixed), NUMBER]
            numbers[i] = number if number >= 0 else UNKNOWN


@compiled
def _enter_all(table: Ints, kept: Bytes, used: int, data: Bytes, starts: Ints, ends: Ints, numbers: Ints) -> int:
    for i in range(len(starts)):
        place = place_of(table, kept, data, starts[i], ends[i], hash_of(data, starts[i], ends[i]))
        used = enter(table, kept, used, place, data, starts[i], ends[i], numbers[i])
    return used


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

    def enter(self, data: Bytes, starts: Ints, ends: Ints, numbers: Ints) -> None:
        """Enter texts, none of them null, or give those that are there another number."""
        self.make_room(len(starts), int((ends - starts).sum()))
        self.used = _enter_all(self.table, self.kept, self.used, data, starts, ends, numbers)

    def make_room(self, count: int, length: int) -> None:
        """For so many more texts, and their bytes."""
        self.entered += count
        if 2 * self.entered > len(self.table):
            old, self.table = self.table, np.full((1 << (4 * self.entered).bit_length(), 4), -1, np.int64)
            _rehash(old, self.table)
        if self.used + length > len(self.kept):
            self.kept = np.concatenate([self.kept[: self.used], np.empty(self.used + length, np.uint8)])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        kept = self.kept[: self.used].tobytes()
        for _, number, start, end in self.table[self.table[:, NUMBER] >= 0].tolist():
            yield kept[start:end].decode(), number
