"""The backtest: predict, then learn when the label would have arrived, in event-time order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np

from features.engine import Applied
from features.inputs import Floats
from features.kernel import Ints
from features.usecase import UseCase
from pipelines.archive import Examples
from pipelines.asof import Asked
from pipelines.joiner import Truth
from pipelines.learner import Learner


def truths(use_case: UseCase, asked: Sequence[Asked], labels: Iterable[Applied]) -> dict[str, tuple[Truth, int]]:
    """Request id -> its label and targets, and the instant (epoch ms) from which they count: what `pipelines.joiner`
    makes of predictions logged at their own time. A request that no label comes for in time is missing.

    labels : events of the label's contract in time order
    """
    label, wait = use_case.label, use_case.label.wait // timedelta(milliseconds=1)
    came: dict[str, list[tuple[Truth, int]]] = defaultdict(list)
    for event in labels:
        if event.contract == label.event and (value := label.value(event.value)) is not None:
            truth = {"label": value} | {name: target(event.value) for name, target in label.targets.items()}
            came[str(getattr(event.value, label.key))].append((truth, event.applied))
    found: dict[str, tuple[Truth, int]] = {}
    for request in asked:
        inside = [(t, at) for t, at in came.get(request.id, ()) if abs(at - request.time) <= wait]
        before, after = [x for x in inside if x[1] < request.time], [x for x in inside if x[1] >= request.time]
        if inside:
            truth, at = before[-1] if before else after[0]
            found[request.id] = truth, max(at, request.time)
        elif label.on_expiry is not None:
            found[request.id] = {"label": label.on_expiry}, request.time + wait
    return found


class Turn(NamedTuple):
    """One turn of the loop: requests to answer (places in the order asked), then labels to learn (places in the
    order they came)."""

    asked: slice
    labels: slice


def turns(seen_until: Ints, label_times: Ints, every: int) -> Iterator[Turn]:
    """Cut a stream into turns so that a request is answered by what had been learned from labels before it alone.

    Parameters
    ----------
    seen_until : [n] in order: a label may be known to a request when its time is smaller
    label_times : [m] in order
    every : labels to collect before they are learned
    """
    answered = 0
    for first in range(0, len(label_times), every):
        last = min(first + every, len(label_times))
        until = int(np.searchsorted(seen_until, label_times[last - 1], side="right"))
        yield Turn(slice(answered, until), slice(first, last))
        answered = until
    yield Turn(slice(answered, len(seen_until)), slice(len(label_times), len(label_times)))


@dataclass
class Progress:
    """How far a learner is: turns done, and the scores [n] of the requests answered, in the order of the examples."""

    turns: int
    scores: Floats


def run(
    learner: Learner,
    examples: Examples,
    every: int,
    tick_ms: int = 1,
    progress: Progress | None = None,
    done: Callable[[Progress, int], None] = lambda progress, now: None,
) -> Floats:
    """Scores [n] of every example, each by the learner as it stood when the example was asked.

    Parameters
    ----------
    examples : in the order in which their labels come
    every : labels a learner gets at a time; fewer at the end
    tick_ms : labels count from the end of their tick, as in a lockstep
    progress : where an earlier run stopped; the learner must be as it was then
    done : called after each turn with the progress and the newest label time (epoch ms)
    """
    seen_until = examples.event_time // tick_ms * tick_ms
    order = np.lexsort((examples.request_id, examples.event_time))
    progress = progress or Progress(0, np.full(len(examples), np.nan, np.float32))
    for i, turn in enumerate(turns(seen_until[order], examples.label_time, every)):
        if i < progress.turns:
            continue
        rows = order[turn.asked]
        if len(rows):
            progress.scores[rows] = learner.score(examples.inputs.take(rows))
        new = examples.take(turn.labels)
        if len(new):
            learner.update(new)
        progress.turns = i + 1
        done(progress, int(examples.label_time[turn.labels.stop - 1]))
    return progress.scores


def blended(scores: Sequence[Floats]) -> Floats:
    """The mean of several learners' scores in logit space.

    >>> blended([np.array([0.5]), np.array([0.9])]).round(3).tolist()
    [0.75]
    """
    clipped = [np.clip(np.asarray(s, np.float64), 1e-6, 1 - 1e-6) for s in scores]
    return np.asarray(1 / (1 + np.exp(-np.mean([np.log(p / (1 - p)) for p in clipped], axis=0))), np.float32)
