"""Events as a step gets them, of structs made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from features.contracts import Contract
from features.engine import places_among
from features.values import Structs
from pipelines.broker import Record
from pipelines.step import TOPIC, Due, Table


def due(contracts: Sequence[Contract], places: Sequence[tuple[int, int, int, int, int]], structs: Sequence[Any]) -> Due:
    """Events of `(applied, topic by number, partition, offset, time)` each, in order."""
    topics = np.array([place[TOPIC] for place in places])
    rows, tables = places_among(topics), []
    for topic in range(len(contracts)):
        own = np.flatnonzero(topics == topic)
        records = [Record("", 0, places[i][3], places[i][0], None, None) for i in own.tolist()]
        tables.append(Table(records, Structs([structs[i] for i in own.tolist()])))
    return Due(contracts, tables, np.column_stack([np.array(places), rows]))
