"""`penstock bench rollout`: trials replayed on the real losses of two backtested learners.

Days are drawn with replacement from the difference of the two (a block is a day: rows of one are alike), recentred so
that the challenger is better by so much on average, and given to the rollout one after the other, as control would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.quality import LOSS_CAP, losses
from pipelines.rollout import PROMOTED, Command, RolloutPolicy, RolloutState, decide, judge
from pipelines.trial import BLOCK_MS, Tally
from services.backtest import Backtest, Plan, default_score_from
from services.backtest_data import Range
from services.settings import Settings

Floats = npt.NDArray[np.float64]
GAINS = (0.0, -0.001, 0.001, 0.002, 0.004)  # of the challenger, nats; negative: it is worse
FROM_MS = 1_356_998_400_000  # 1 January 2013
SEED, TIMES = 1, 1000


def bench(days: int) -> dict[str, Any]:
    """The blend of net and trees against the trees alone, over so many days of flights."""
    settings = Settings.load()
    over = Range(FROM_MS, FROM_MS + days * BLOCK_MS, 1, 0)
    plan = Plan("flights", over, default_score_from(over), ("online+lightgbm", "lightgbm"))
    return replays(Backtest(settings.home, plan), *plan.learners, TIMES, RolloutPolicy.standard())


def replays(test: Backtest, challenger: str, champion: str, times: int, policy: RolloutPolicy) -> dict[str, Any]:
    """How often a challenger of each gain is promoted, after how many days; how soon broken ones are rolled back."""
    rows = test.scored
    label, time = test.examples.label[rows], test.examples.event_time[rows]
    scores = [test.scores(text)[0][rows] for text in (challenger, champion)]
    clipped = [np.minimum(losses(label, score), LOSS_CAP) for score in scores]
    days, day, count = np.unique(time // BLOCK_MS, return_inverse=True, return_counts=True)
    means = np.bincount(day, clipped[0] - clipped[1]) / count
    found: dict[str, Any] = {"challenger": challenger, "champion": champion, "days": len(days), "replays": times}
    found |= {"mean_difference": float(means.mean()), "day_sd": float(means.std()), "horizon_days": policy.horizon_days}
    for gain in GAINS:
        rng = np.random.default_rng(SEED)
        drawn = rng.choice(means - means.mean(), (times, policy.horizon_days)) - gain
        ends = [replayed(ahead, int(count.mean()), policy) for ahead in drawn]
        actions = Counter(action for action, _ in ends)
        after = [n for action, n in ends if action == PROMOTED]
        name = f"gain_{gain:+.3f}"
        found[f"{name}_promoted"] = actions[PROMOTED] / times
        found[f"{name}_median_days"] = float(np.median(after)) if after else None
    begins = np.random.default_rng(SEED).integers(0, len(label) // 2, 20)
    served = scores[1].astype(np.float64)
    for name, broken in BROKEN.items():
        asked = [requests_until_back(served, label, time, broken, policy, start) for start in begins]
        found |= {f"broken_{name}_requests": float(np.median(asked)), f"broken_{name}_requests_most": max(asked)}
    return found


def trial(policy: RolloutPolicy) -> RolloutState:
    """Version 2 in shadow beside 1."""
    state, _ = decide(RolloutState(), Command("promote", "1", id="1"), policy, 0)
    return decide(state, Command("consider", "2", id="2"), policy, 0)[0]


def replayed(means: Sequence[float], requests: int, policy: RolloutPolicy) -> tuple[str, int]:
    """How a trial over these days' mean differences ended, and after how many of them."""
    state = trial(policy)
    for day, mean in enumerate(means, 1):
        sums = {"requests": float(requests), "canary": requests * policy.share}
        block = {"start": day, "n": requests, "difference": float(mean) * requests, "gap": 0.0, "champion_gap": 0.0}
        evidence = {"partition": 0, "closed": day + 1, "champion": "1", "challenger": "2"}
        state, _ = judge(state, SimpleNamespace(**evidence, requests=sums, blocks=[block]), policy, day)
        if state.trial is None:
            return state.decisions[-1].action, day
    return "none", len(means)


def _no_number(score: Floats) -> tuple[list[float | None], float]:
    return [None] * len(score), 1.0


def _slow(score: Floats) -> tuple[list[float | None], float]:
    return list(score), 50.0


def _shifted(score: Floats) -> tuple[list[float | None], float]:
    return list(np.minimum(score + 0.3, 0.999)), 1.0


def _overconfident(score: Floats) -> tuple[list[float | None], float]:
    odds = 3 * np.log(score / (1 - score))
    return list(1 / (1 + np.exp(-odds))), 1.0


def _others_scores(score: Floats) -> tuple[list[float | None], float]:
    return list(np.roll(score, 500)), 1.0


BROKEN: dict[str, Callable[[Floats], tuple[list[float | None], float]]] = {
    "nan": _no_number,
    "slow": _slow,
    "shifted": _shifted,
    "miscalibrated": _overconfident,
    "of_another_row": _others_scores,
}


def requests_until_back(
    champion: Floats, label: Floats, time: Any, broken: Callable[..., Any], policy: RolloutPolicy, start: int
) -> int:
    """How many requests a broken copy of the champion is asked, from the request `start` on, until it is rolled back.

    Labels come a day and a half after their request, as flights' last ones do.
    """
    wait, state = BLOCK_MS * 3 // 2, trial(policy)
    tally, known, asked = Tally(0, wait), [], 0
    score = np.clip(champion[start:], 1e-6, 1 - 1e-6)
    challenger, spent = broken(score)
    for i, value in enumerate(challenger):
        now = int(time[start + i])
        one = SimpleNamespace(
            event_time=now, version="1", arm="champion", score=float(score[i]), shadow={"2": value},
            score_ms={"1": 1.0, "2": spent},
        )  # fmt: skip
        asked += 1
        tally.predicted(one)
        known.append((one, float(label[start + i])))
        for old, truth in _due(known, now - wait):
            tally.labelled(old, truth)
        if told := tally.take(now):
            state, _ = judge(state, SimpleNamespace(**told), policy, now)
        if state.trial is None:
            return asked
    return asked


def _due(known: list[tuple[Any, float]], until: int) -> Iterator[tuple[Any, float]]:
    while known and known[0][0].event_time <= until:
        yield known.pop(0)
