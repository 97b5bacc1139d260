"""`penstock bench freshness`, small, on the real parts; and what a bench refuses to fill."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks import freshness
from benchmarks.rig import as_text, quantile_ms, rig
from features.errors import ConfigError
from features.flights import use_case


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:Stream feature views are experimental")
def test_every_probe_becomes_readable_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(freshness, "SETTLE_S", 1)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    result = freshness.bench(seconds=5, rate=200)
    assert result["never_appeared"] == 0
    assert result["probes"] == 250
    assert 0 < result["online_p50_ms"] <= result["online_p99_ms"] <= result["online_max_ms"]
    assert result["commits_per_s"] > 0 and result["values_read_alike_by_feast"] > 0
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_a_bench_leaves_a_configured_kafka_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KAFKA_BOOTSTRAP", "127.0.0.1:9")
    with pytest.raises(ConfigError, match="kafka_bootstrap"), rig(use_case):
        pass


def test_quantiles_are_of_the_nearest_rank() -> None:
    seconds = [i / 1000 for i in range(100, 0, -1)]
    assert [quantile_ms(seconds, q) for q in (0, 0.5, 0.99, 1)] == [1, 51, 100, 100]
    assert as_text({"a": 1000, "b": {"c": 2.5}}).split() == ["a", "1,000", "b", "c", "2.5"]
