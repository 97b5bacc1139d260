"""Ids that were met within the dedupe horizon."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from features.json_events import Bytes
from features.kernel import Ints, compiled
from features.texts import NUMBER, Span, Texts, encoded, hash_of, place_of, put


@compiled
def _note(
    young: Ints,
    kept: Bytes,
    used: int,
    old: Ints,
    old_kept: Bytes,
    data: Bytes,
    starts: Ints,
    ends: Ints,
    times: Ints,
    clocks: Ints,
    seen: int,
    slack: int,
    horizon: int,
    hashes: Ints,
    repeated: NDArray[np.bool_],
) -> int:
    """Note each id at the instant at which it is met, unless it was met within the horizon; returns the bytes kept."""
    touched = 0
    for i in range(len(starts)):  # at once, so that the memory's answers overlap
        hashes[i] = hash_of(data, starts[i], ends[i])
        touched ^= young[hashes[i] & (len(young) - 1), NUMBER] ^ old[hashes[i] & (len(old) - 1), NUMBER]
    hashes[len(starts)] = touched  # what nobody needs is not touched
    for i in range(len(starts)):
        place = place_of(young, kept, data, starts[i], ends[i], hashes[i])
        before = old[place_of(old, old_kept, data, starts[i], ends[i], hashes[i]), NUMBER]
        mark = max(seen, clocks[i])
        repeated[i] = max(young[place, NUMBER], before) >= max(0, mark - horizon)
        if not repeated[i]:
            used = put(young, kept, used, place, data, starts[i], ends[i], max(times[i], mark))
            seen = max(seen, times[i] - slack)
    return used


def compile_kernels() -> None:
    """Compile what intakes run, once per machine."""
    none = np.zeros(0, np.int64)
    Seen(0).repeated(encoded([]), none, none, 0, 0)


class Seen:
    """Ids of one contract, and the instant at which each was met and counted; those within the horizon count.

    They are kept in two generations, of which the older goes as a whole, so that forgetting costs nothing: each for at
    most two horizons.

    horizon : ms
    """

    def __init__(self, horizon: int) -> None:
        self.horizon, self.young, self.old = horizon, Texts(), Texts()
        self.newest = self.newest_old = self.before = 0

    def repeated(self, ids: Span, times: Ints, clocks: Ints, seen: int, slack: int) -> Ints:
        """Which of a partition's next events were met before; the others are noted.

        times, clocks : event time, and the clock record in force at each
        seen, slack : what the partition had shown before, and how far behind its events are on time; all in ms
        """
        data, starts, ends = ids
        repeated, young = np.empty(len(starts), bool), self.young
        young.make_room(len(starts), int((ends - starts).sum()))
        young.used = _note(
            young.table,
            young.kept,
            young.used,
            self.old.table,
            self.old.kept,
            data,
            starts,
            ends,
            times,
            clocks,
            seen,
            slack,
            self.horizon,
            np.empty(len(starts) + 1, np.int64),
            repeated,
        )
        self.newest = max(self.newest, seen, int(times.max(initial=0)), int(clocks.max(initial=0)))
        young.entered -= int(repeated.sum())
        return np.flatnonzero(repeated)

    def forget(self, before: int) -> None:
        """What was met before this instant doesn't count any more."""
        self.before = before
        if self.newest_old < before:
            self.young, self.old, self.newest_old = Texts(), self.young, self.newest

    def snapshot(self) -> list[tuple[int, str]]:
        met = dict(self.old) | dict(self.young)
        return [(time, id) for id, time in met.items() if time >= self.before]

    def restore(self, met: Iterable[tuple[int, object]]) -> None:
        self.__init__(self.horizon)  # type: ignore[misc]
        times, ids = zip(*met, strict=True) if (met := list(met)) else ((), ())
        self.young.enter(*encoded(ids), np.array(times, np.int64))
        self.newest = max(times, default=0)
