"""A search's trials: none lost or doubled by a kill, the hopeless ones stopped, what mattered told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.backtest import Progress
from pipelines.learners import KINDS, Space, Span, parse
from pipelines.quality import log_loss
from pipelines.search import DAY_MS, LEAST_DAYS, MOST_TRIES, DayLosses, Search

SPACE: Space = {"rate": Span(0.01, 1.0, log=True), "leaves": Span(2, 9), "shape": ("8", "16x8")}
FIRST = {"rate": 0.1, "leaves": 4, "shape": "8"}
DAYS = 20


def opened(folder: Path) -> Search:
    return Search(folder / "journal", SPACE, FIRST)


def settings(text: str) -> dict[str, str]:
    return dict(part.split("=") for part in text.split(","))


def played(search: Search, trials: int) -> None:
    """Trials whose loss follows from the rate alone, whatever the day brings."""
    rng = np.random.default_rng(0)
    weather = rng.normal(0.5, 0.1, DAYS)
    while search.started < trials:
        number, text = search.ask()
        loss = abs(np.log10(float(settings(text)["rate"])) + 1.5) * 0.02
        daily = weather + loss + rng.normal(0, 0.002, DAYS)
        for day in range(DAYS):
            if search.report(number, day, float(daily[day])):
                search.finish(number, None)
                break
        else:
            search.finish(number, float(daily.mean()))


def test_the_first_trial_has_the_settings_given_and_the_hopeless_are_stopped(tmp_path: Path) -> None:
    search = opened(tmp_path)
    played(search, 30)
    table = search.table()
    assert table[0]["settings"] == search.first == "rate=0.1,leaves=4,shape=8" and table[0]["state"] == "finished"
    stopped = [t for t in table if t["state"] == "stopped"]
    assert len(table) == 30 and stopped and all(LEAST_DAYS <= t["days"] < DAYS for t in stopped)
    best = settings(search.best() or "")
    assert abs(np.log10(float(best["rate"])) + 1.5) < 0.3
    found = search.importances()
    assert found["rate"] == max(found.values()) > 0.6 and sum(found.values()) == pytest.approx(1, abs=1e-3)


def test_what_ran_when_the_search_was_killed_runs_again_once(tmp_path: Path) -> None:
    search = opened(tmp_path)
    played(search, 2)
    lost = [search.ask()[1] for _ in range(2)]
    with (tmp_path / "journal").open("ab") as journal:
        journal.write(b'{"half a rec')
    (tmp_path / "journal.lock").symlink_to(tmp_path / "journal")
    opened(tmp_path)  # killed again before it asks
    again = opened(tmp_path)
    assert [again.ask()[1] for _ in range(2)] == lost
    assert again.started == 4 and len(again.table()) == 2
    assert again.ask()[1] not in lost


def test_a_trial_that_is_always_killed_is_given_up(tmp_path: Path) -> None:
    search = opened(tmp_path)
    for _ in range(MOST_TRIES):
        number, text = search.ask()
        assert text == search.first
        search.lose(number)
    assert search.ask()[1] != search.first and opened(tmp_path).started == 0


def test_days_are_told_once_when_all_their_requests_are_answered() -> None:
    time = np.array([0, DAY_MS - 1, DAY_MS, 3 * DAY_MS, 3 * DAY_MS])
    label, scores = np.array([0, 1, 1, 0, 1.0]), np.array([0.5, 0.2, 0.9, 0.1, 0.2])
    days = DayLosses(label, time, np.array([False, True, True, True, True]))
    progress = Progress(0, scores)
    assert days.after(progress, DAY_MS - 1) == []
    assert days.after(progress, 3 * DAY_MS) == [(d, log_loss(label[[i]], scores[[i]])) for d, i in ((0, 1), (1, 2))]
    assert days.after(progress, 3 * DAY_MS + 1) == []
    assert days.mean(scores) == log_loss(label[1:], scores[1:])


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind().space])
def test_the_defaults_lie_in_the_space(name: str) -> None:
    kind = KINDS[name]()
    for setting, span in kind.space.items():
        default = kind.settings[setting]
        if isinstance(span, Span):
            assert span.low <= default <= span.high and type(span.low) is type(default)
        else:
            assert default in [parse(f"{name}:{setting}={text}").settings[setting] for text in span]
