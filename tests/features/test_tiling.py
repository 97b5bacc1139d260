"""At tile ends the values of non-empty windows equal those of Feast's own tiling."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pandas as pd
import pytest
from feast.aggregation import Aggregation
from feast.aggregation.tiling.orchestrator import apply_sawtooth_window_tiling
from feast.aggregation.tiling.tile_subtraction import convert_cumulative_to_windowed

from features.engine import Applied, Engine, Events
from features.views import stream_view
from tests.features.test_windows import MINUTE, moved, use_case, user

FUNCTIONS = ("count", "sum", "mean", "min", "max", "std")


@pytest.mark.parametrize(("window", "slide"), [(60, 10), (30, 15), (120, 60)])
def test_tile_ends_equal_feast(window: int, slide: int) -> None:
    rng = random.Random(window)
    wide, hop = timedelta(minutes=window), timedelta(minutes=slide)
    values = [
        SimpleNamespace(
            id=str(i),
            at=i * MINUTE * 3 + rng.randrange(1, MINUTE),
            user=rng.choice("ab"),
            size=rng.randrange(9),
            price=0.0,
            kind=None,
        )
        for i in range(200)
    ]
    aggregations = [Aggregation("size", f, wide, hop, f) for f in FUNCTIONS]
    view = stream_view("tiled", [user], moved, "toy", aggregations)
    engine = Engine(replace(use_case, views=(view,), timers={}))
    ours: dict[tuple[str, int], dict[str, float]] = {}
    end = (values[-1].at // (slide * MINUTE) + 1) * slide * MINUTE
    changed, _ = engine.advance(Events.of([Applied("moved", v, v.at, v.at) for v in values]), end)
    rows = changed["tiled"]
    for i, key in enumerate(rows.keys[0]):
        ours[key, int(rows.times[i])] = {f: float(rows.columns[f][i]) for f in FUNCTIONS}
    compared = 0
    for row in feast_tiles(values, aggregations, wide, hop).itertuples():
        held = [at for key, at in ours if key == row.user and at <= row.at]
        if held and ours[row.user, max(held)]["count"]:
            expected = {f: getattr(row, f) for f in FUNCTIONS}
            if row.count < 2:
                expected["std"] = float("nan")
            found = ours[row.user, max(held)]
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True), (row.user, row.at)
            compared += 1
    assert compared >= 20


def feast_tiles(
    values: list[SimpleNamespace], aggregations: list[Aggregation], wide: timedelta, hop: timedelta
) -> pd.DataFrame:
    """Feast's windowed values by user and tile end (`at`, epoch ms)."""
    events = pd.DataFrame({"user": [v.user for v in values], "size": [v.size for v in values]})
    events["time"] = pd.to_datetime([v.at for v in values], unit="ms", utc=True)
    tiles = apply_sawtooth_window_tiling(events, aggregations, ["user"], "time", wide, hop)
    found = convert_cumulative_to_windowed(tiles, ["user"], "time", wide, aggregations)
    found["at"] = (pd.to_datetime(found["time"], utc=True) - pd.Timestamp(0, tz="UTC")) // pd.Timedelta(milliseconds=1)
    return found.sort_values("at")
