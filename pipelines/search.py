"""A search for settings: which to try next, which trial to stop early, what mattered. Optuna's trials in a journal."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pipelines.archive import Times
from pipelines.backtest import Progress
from pipelines.comparison import DAY_MS
from pipelines.learners import Space, Span
from pipelines.quality import Floats, losses

MOST_TRIES = 3  # of one trial whose process is killed
LEAST_DAYS = 7  # before a trial may be stopped: each weekday is another problem
DOUBT = 0.05
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Search:
    """The trials of one search, in a journal that outlives its process; one process at a time has it open.

    A trial is stopped when its losses by day lie above those of the best one by Wilcoxon's signed-rank test: days
    differ more than settings do, so only the same days compare.

    Parameters
    ----------
    path : the journal
    space : what may be tried
    first : the settings of the first trial, which lie in the space
    """

    def __init__(self, path: Path, space: Space, first: Mapping[str, Any]) -> None:
        self.distributions = {name: _distribution(span) for name, span in space.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            pruner = optuna.pruners.WilcoxonPruner(p_threshold=DOUBT, n_startup_steps=LEAST_DAYS)
        self.study = optuna.create_study(study_name="search", storage=storage, pruner=pruner, load_if_exists=True)
        self.study.sampler = optuna.samplers.TPESampler(
            seed=len(self.study.trials), multivariate=True, constant_liar=True
        )
        self.running: dict[int, optuna.Trial] = {}
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):  # of a process that was killed
            self.study.tell(trial.number, state=TrialState.FAIL)
        self.first = as_settings(first)
        if not self.study.trials:
            self.study.enqueue_trial(dict(first))
        self._again()

    def _again(self) -> None:
        """Queue what was lost, and nothing twice."""
        trials = self.study.get_trials()
        lost = [t.params for t in trials if t.state is TrialState.FAIL]
        have = [t.params for t in trials if t.state in FINISHED or t.number in self.running]
        have += [t.system_attrs["fixed_params"] for t in trials if t.state is TrialState.WAITING]
        for i, params in enumerate(lost):
            if params not in have and params not in lost[:i] and lost.count(params) < MOST_TRIES:
                self.study.enqueue_trial(params)

    @property
    def started(self) -> int:
        """Trials that are finished or running."""
        return len(self.study.get_trials(deepcopy=False, states=FINISHED)) + len(self.running)

    def ask(self) -> tuple[int, str]:
        """The next trial's number and its settings as `pipelines.learners` reads them."""
        trial = self.study.ask(self.distributions)
        self.running[trial.number] = trial
        return trial.number, as_settings(trial.params)

    def report(self, number: int, day: int, loss: float) -> bool:
        """A trial's mean loss on a day (days since the epoch): whether to stop it here. The first settings go on."""
        trial = self.running[number]
        trial.report(loss, day)
        return as_settings(trial.params) != self.first and trial.should_prune()

    def finish(self, number: int, loss: float | None) -> None:
        """A trial's mean loss over all examples; None when it was stopped."""
        self.study.tell(number, loss, TrialState.PRUNED if loss is None else TrialState.COMPLETE)
        del self.running[number]

    def lose(self, number: int) -> None:
        """A trial's process is gone: it is tried again, as often as three times."""
        self.study.tell(number, state=TrialState.FAIL)
        del self.running[number]
        self._again()

    def best(self) -> str | None:
        """The settings of the best finished trial."""
        return as_settings(self.study.best_trial.params) if self._complete() else None

    def _complete(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def losses(self) -> dict[str, float]:
        """Mean losses of the trials that finished, by their settings."""
        return {t["settings"]: t["log_loss"] for t in self.table() if t["log_loss"] is not None}

    def importances(self) -> dict[str, float]:
        """How much of being among the best each setting explains (PED-ANOVA, Watanabe et al. 2023), summing to one;
        none from fewer than four finished trials."""
        found = optuna.importance.get_param_importances(self.study) if self._complete() > 3 else {}
        return {name: round(float(value), 4) for name, value in found.items()}

    def table(self) -> list[dict[str, Any]]:
        """Finished trials: `trial`, `state`, `log_loss` (None when it was stopped), `days`, `seconds`, `settings`."""
        return [
            {
                "trial": t.number,
                "state": "stopped" if t.state is TrialState.PRUNED else "finished",
                "log_loss": round(t.value, 5) if t.state is TrialState.COMPLETE and t.value is not None else None,
                "days": len(t.intermediate_values),
                "seconds": round(t.duration.total_seconds(), 1) if t.duration else None,
                "settings": as_settings(t.params),
            }
            for t in self.study.get_trials(states=FINISHED)
        ]


def as_settings(params: Mapping[str, Any]) -> str:
    """A trial's parameters as text, numbers to three digits."""
    return ",".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def _distribution(span: Span | tuple[str, ...]) -> BaseDistribution:
    if isinstance(span, tuple):
        return CategoricalDistribution(span)
    if isinstance(span.low, int) and isinstance(span.high, int):
        return IntDistribution(span.low, span.high, log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def _mend(path: Path) -> None:
    """Cut off what a killed process had half written, and take the lock that it may have held."""
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)


class DayLosses:
    """Tells the mean loss of each day of event time, once all of the day's requests are answered.

    Parameters
    ----------
    label, event_time : [n] of the examples; `scored`: which of them count
    """

    def __init__(self, label: Floats, event_time: Times, scored: Any) -> None:
        self.label, self.rows = label, np.flatnonzero(scored)
        self.day = event_time[self.rows] // DAY_MS
        self.days = np.unique(self.day).tolist()

    def after(self, progress: Progress, now_ms: int) -> list[tuple[int, float]]:
        """The days that are over since the last call, each with its mean loss."""
        over = [d for d in self.days if (d + 1) * DAY_MS <= now_ms]
        self.days = self.days[len(over) :]
        return [(d, self.mean(progress.scores, self.day == d)) for d in over]

    def mean(self, scores: Floats, which: Any = slice(None)) -> float:
        """Mean loss over what counts, in nats."""
        rows = self.rows[which]
        return float(losses(self.label[rows], scores[rows]).mean())
