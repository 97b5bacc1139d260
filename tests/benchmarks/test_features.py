"""The parts of `penstock bench features` that decide what its figures mean."""

from __future__ import annotations

from datetime import timedelta

import pytest

from benchmarks import engine, features, fold
from features.engine import Engine
from features.errors import UnavailableError
from services.source import SourceEvent


def test_a_batch_never_splits_an_instant_and_its_watermark_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BATCH", 3)
    events = [SourceEvent("read", at, b"", b"") for at in (1, 2, 3, 3, 3, 4, 5, 6)]
    cuts = [([e.time for e in batch], watermark) for batch, watermark in engine.cut(events)]
    assert cuts == [([1, 2, 3, 3, 3], 4), ([4, 5, 6], 7)]


@pytest.mark.parametrize("key", [int, str])
def test_the_synthetic_stream_is_drawn_by_zipf_in_time_order_and_fills_the_engine(key: type) -> None:
    times, keys = engine.zipf(1000)
    assert (times[1:] >= times[:-1]).all() and keys.max() < 1000
    assert (keys == 0).sum() / (keys == 9).sum() == pytest.approx(10, rel=0.1)
    cuts = engine.cut(engine.readings(times[:5000].tolist(), keys[:5000].tolist(), key))
    use_case = engine.one_view(timedelta(hours=1), key)
    found = engine.together(engine.timings(use_case, Engine(use_case), cuts))
    assert (found.events, found.rows > 5000) == (5000, True)  # events and tails both write rows


def test_the_fold_job_has_27_features_of_three_kinds() -> None:
    views = fold.fold_use_case().views
    assert sum(len(view.features) for view in views) == 27
    asked = {f"{view.name}_{what}_{hours}h" for view in views for hours in fold.HOURS for what in fold.WHAT}
    assert asked == {f.name for view in views for f in view.features}


def test_folds_that_differ_are_no_comparison() -> None:
    ours = {"origin": {"EWR": [2, 0.5, None]}}
    assert features.same_values(ours, {"origin": {"EWR": [2, 0.5 + 1e-12, None]}}) == 3
    for theirs in ([2, 0.6, None], [2, 0.5, 0.0]):
        with pytest.raises(UnavailableError, match="origin EWR"):
            features.same_values(ours, {"origin": {"EWR": theirs}})
    with pytest.raises(UnavailableError, match="origin JFK"):
        features.same_values(ours, {"origin": {"JFK": [0, None, None]}})


def test_memory_is_told_by_key_and_by_tile() -> None:
    def case(us: float, keys: int, tiles: int) -> dict[str, float]:
        state = keys * 100 + tiles * 50
        return {
            "us_per_event": us,
            "us_first_tenth": us,
            "us_last_tenth": us,
            "live_keys": keys,
            "tiles": tiles,
            "state_mb": state / 1e6,
        }

    found = features.ratios(
        case(2, 10, 10), case(3, 1000, 90_000), case(6, 100_000, 200_000), case(4, 1, 1), case(7, 1, 1)
    )
    assert (found["window_cost_ratio"], found["keys_cost_ratio"], found["history_cost_ratio"]) == (1.5, 2, 1)
    assert found["text_keys_cost_ratio"] == 1.75
    assert (found["bytes_per_key"], found["bytes_per_tile"]) == (100, 50)
