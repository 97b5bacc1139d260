"""Readers of a news site, made up: what they are shown and what they open, as events and scoring requests.

Each reader has a rate of clicks, hours of the day and a taste for sections that drifts over weeks; for some hours one
section has caught them. The same seed gives the same stream, day by day. A few clicks come after the label's wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from services.source import Request, SourceEvent

SEED, USERS = 7, 150
SECTIONS = ("politics", "sport", "culture", "science", "travel", "business")
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000  # ms
PER_DAY = 14.0  # impressions of a reader
ARTICLES = 5  # new ones of a section every day
CAUGHT = 1.8  # what a section that has caught a reader adds to the log-odds of a click
DELAY_MIN = 4.0  # mean minutes from impression to click

encode = msgspec.json.Encoder().encode


def events(from_ms: int, until_ms: int) -> list[SourceEvent]:
    """Impressions and clicks with from_ms <= time < until_ms by (time, event, id); epoch ms."""
    days = range(from_ms // DAY - 1, (until_ms - 1) // DAY + 1)  # a click may fall on the day after its impression
    found = [item for day in days for item in _day(day)[0] if from_ms <= item[0] < until_ms]
    return [event for *_, event in sorted(found, key=lambda item: item[:3])]


def requests(from_ms: int, until_ms: int) -> list[Request]:
    """A request for each impression with from_ms <= time < until_ms by (time, id); epoch ms."""
    days = range(from_ms // DAY, (until_ms - 1) // DAY + 1)
    found = [r for day in days for r in _day(day)[1] if from_ms <= r.time < until_ms]
    return sorted(found, key=lambda request: (request.time, request.id))


@lru_cache(maxsize=4)
def _day(day: int) -> tuple[list[tuple[int, str, str, SourceEvent]], list[Request]]:
    made: list[tuple[int, str, str, SourceEvent]] = []
    asked: list[Request] = []
    for user in range(USERS):
        for id_, time, about, position, click in _impressions(user, day):
            body = {"id": f"{id_}/shown", "time": time, **about, "position": position}
            made.append(_event("shown", about["user"], body))
            entities = {name: about[name] for name in ("user", "section")}
            row = {"request_id": id_, "event_time": time, "entities": entities}
            asked.append(Request(id_, time, row | {"fields": {"article": about["article"], "position": position}}))
            if click is not None:
                body = {"id": f"{id_}/clicked", "time": click, **about, "impression": id_}
                made.append(_event("clicked", about["user"], body))
    return made, asked


def _event(name: str, user: str, body: dict[str, Any]) -> tuple[int, str, str, SourceEvent]:
    return body["time"], name, body["id"], SourceEvent(name, body["time"], user.encode(), encode(body))


def _impressions(user: int, day: int) -> Iterator[tuple[str, int, dict[str, str], int, int | None]]:
    """Request id, time, what is shown to whom, position, and the time of the click or None."""
    habits, rng = np.random.default_rng([SEED, user]), np.random.default_rng([SEED, user, day])
    rate, wakes = habits.normal(-2.6, 0.7), habits.uniform(0, 24)
    taste, phase, period = habits.normal(0, 0.8, 6), habits.uniform(0, 6.3, 6), habits.uniform(10, 40, 6)
    now = taste * np.sin(2 * np.pi * day / period + phase)
    caught = rng.integers(0, len(SECTIONS), 4)
    hours = (wakes + np.sort(rng.beta(2, 2, rng.poisson(PER_DAY)) * 16)) % 24
    for n, hour in enumerate(np.sort(hours)):
        time = day * DAY + int(hour * HOUR)
        section, position = int(rng.integers(0, len(SECTIONS))), int(rng.integers(1, 11))
        odds = rate + now[section] - 0.12 * position + CAUGHT * (caught[int(hour // 6)] == section)
        clicks = rng.random() < 1 / (1 + np.exp(-odds))
        delay = int(rng.exponential(DELAY_MIN) * MINUTE) + 1000
        article = f"{SECTIONS[section]}-{day}-{rng.integers(0, ARTICLES)}"
        about = {"user": f"u{user}", "section": SECTIONS[section], "article": article}
        yield f"u{user}-{day}-{n}", time, about, position, time + delay if clicks else None
