"""`penstock tune`: a search for better settings over backtests, judged on later examples; the best is trained."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from features.errors import InputError, PenstockError, UnavailableError
from features.usecase import ModelInputs
from pipelines import archive, comparison
from pipelines.backtest import run
from pipelines.checkpoint import listed_files
from pipelines.learners import Spec, parse, written
from pipelines.search import LEAST_DAYS, DayLosses, Search
from services import wiring
from services.backtest import Backtest, Plan, Result, default_score_from, difference, figure, log_run
from services.backtest_data import Made, Range
from services.progress import iso
from services.settings import Settings
from services.train import alone, code_version, train

MISSED = "its process was killed"
MOST_MISSED = 5  # one after the other: something is wrong with this machine


class Stopped(Exception):
    """A trial that need not go on."""


@dataclass(frozen=True)
class Task:
    """What trials are about: sent to their processes.

    plan : the backtest, whose one learner has the settings that are used now, if they are not its defaults
    held_from : epoch ms; the search sees the requests before it, the rest judge what it found
    made : the examples; None makes those of the plan's range
    """

    home: Path
    plan: Plan
    held_from: int
    made: Made | None = None

    @property
    def now(self) -> str:
        return self.plan.learners[0]

    @property
    def kind(self) -> str:
        return self.now.partition(":")[0]

    def learner(self, settings: str) -> Spec:
        """The learner as it is now, but for these settings."""
        return parse(f"{self.now}{',' if ':' in self.now else ':'}{settings}")

    def backtest(self, shown: bool = False) -> Backtest:
        return Backtest(self.home, self.plan, shown, self.made)


def make_task(
    settings: Settings,
    name: str,
    learner: str,
    from_ms: int | None,
    until_ms: int | None,
    score_from: int | None,
    held_from: int | None,
    live: bool,
) -> Task:
    """The task of a range of recorded data or, without one, of the live examples; `live`: compared with the settings
    that retrains use, if the learner is given none."""
    if from_ms is None or until_ms is None:
        made, over = live_examples(settings, name)
    else:
        made, over = None, Range(from_ms, until_ms)
    if live and learner == "online" and (tuned := wiring.registry(settings).settings(name)):
        learner = f"{learner}:{tuned}"
    first = default_score_from(over) if score_from is None else score_from
    plan = Plan(name, over, first, (learner,))
    return Task(settings.home, plan, default_held_from(plan) if held_from is None else held_from, made)


def live_examples(settings: Settings, name: str) -> tuple[Made, Range]:
    """The archive of what was served, from its first request to its last."""
    mend = "give --from and --until to search on recorded data"
    try:
        files = listed_files(settings.state_url, name, "joiner", "examples", wiring.broker(settings))
    except UnavailableError as error:
        raise UnavailableError(f"{error}; {mend}") from None
    times = archive.load(files, ModelInputs(()), 0, 2**62).event_time
    if not len(times):
        raise InputError(f"{name} has no live examples yet: {mend}")
    return Made(tuple(files), f"archive-{Path(files[-1]).stem}"), Range(int(times.min()), int(times.max()) + 1)


def default_held_from(plan: Plan) -> int:
    """The start of the day at which three quarters of what is scored are over."""
    at = plan.score_from + (plan.over.until_ms - plan.score_from) * 3 // 4
    return at // comparison.DAY_MS * comparison.DAY_MS


def serve_trials(pipe: Connection, task: Task) -> None:
    """A process of trials: gets settings, tells its losses by day and is answered whether to stop, then their mean."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search ends it
    os.nice(10)
    try:
        _serve(pipe, task)
    except Exception as error:  # what it is, the search's user is told
        pipe.send(str(error) if isinstance(error, PenstockError) else f"a trial failed: {error!r}")


def _exchange(pipe: Connection, *messages: Any) -> Any:
    """Say something, and what is answered; ends this process when the search has been killed."""
    try:
        for message in messages:
            pipe.send(message)
        return pipe.recv()
    except (EOFError, ConnectionError):
        sys.exit()


def _serve(pipe: Connection, task: Task) -> None:
    settings = _exchange(pipe)
    test = task.backtest()
    before = test.examples.event_time < task.held_from
    examples, scored = test.examples.take(before), test.scored[before]
    folder = test.home / "tune" / str(os.getpid())
    while True:
        spec = task.learner(settings)
        days = DayLosses(examples.label, examples.event_time, scored)

        def tell(progress: Any, now_ms: int, days: DayLosses = days) -> None:
            for day, loss in days.after(progress, now_ms):
                if _exchange(pipe, (day, loss)):
                    raise Stopped

        try:
            scores = run(spec.make(test.context(folder)), examples, *test.pace(spec), done=tell)
            settings = _exchange(pipe, days.mean(scores))
        except Stopped:
            settings = _exchange(pipe, None)


class Workers:
    """Processes that run trials; one that dies is replaced."""

    def __init__(self, task: Task, jobs: int) -> None:
        self.task, self.context = task, multiprocessing.get_context("spawn")
        self.idle = [self._start() for _ in range(jobs)]
        self.busy: dict[Connection, tuple[Any, int]] = {}

    def _start(self) -> tuple[Connection, Any]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve_trials, args=(theirs, self.task), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def begin(self, number: int, settings: str) -> None:
        """Have an idle process run a trial."""
        pipe, process = self.idle.pop()
        self.busy[pipe] = process, number
        try:
            pipe.send(settings)
        except BrokenPipeError:  # it died idle: `heard` tells
            return

    def heard(self, timeout: float | None) -> list[tuple[Connection, int, Any]]:
        """What running trials say: their pipe, number and message, `MISSED` when one's process has died."""
        found: list[tuple[Connection, int, Any]] = []
        for pipe in wait(list(self.busy), timeout):
            assert isinstance(pipe, Connection)
            process, number = self.busy[pipe]
            try:
                found.append((pipe, number, pipe.recv()))
            except (EOFError, ConnectionResetError):
                process.join()
                del self.busy[pipe]
                self.idle.append(self._start())
                found.append((pipe, number, MISSED))
        return found

    def done(self, pipe: Connection) -> None:
        """A process is free for another trial."""
        self.idle.append((pipe, self.busy.pop(pipe)[0]))

    def close(self) -> None:
        for process in [p for _, p in self.idle] + [p for p, _ in self.busy.values()]:
            process.kill()
            process.join()


def explore(task: Task, search: Search, trials: int, jobs: int, timeout: float | None) -> None:
    """Run trials until there are so many, or no time is left: what runs then is tried again by a later search."""
    ends = time.monotonic() + timeout if timeout else None
    missed = 0
    with closing(Workers(task, jobs)) as workers:
        while True:
            while workers.idle and search.started < trials:
                workers.begin(*search.ask())
            left = None if ends is None else ends - time.monotonic()
            if not workers.busy or (left is not None and left <= 0):
                return
            for pipe, number, message in workers.heard(left):
                missed = missed + 1 if message == MISSED else 0
                if missed > MOST_MISSED:
                    raise PenstockError(f"{missed} processes of trials died one after the other: is there memory?")
                if message == MISSED:
                    say(f"trial {number}: {MISSED}; it is tried again")
                    search.lose(number)
                elif isinstance(message, str):
                    raise PenstockError(message)
                elif isinstance(message, tuple):
                    pipe.send(search.report(number, *message))
                else:
                    search.finish(number, message)
                    workers.done(pipe)
                    table = search.table()
                    tell(next(t for t in table if t["trial"] == number), len(table), trials)


def tell(trial: Mapping[str, Any], finished: int, of: int) -> None:
    how = f"log loss {trial['log_loss']:.4f}" if trial["log_loss"] else f"stopped after {trial['days']} days"
    say(f"{finished} of {of}: trial {trial['trial']}, {how}, {trial['seconds']:.0f} s: {trial['settings']}")


def say(text: str) -> None:
    print(text, flush=True)


def tune(
    settings: Settings, task: Task, trials: int, jobs: int, timeout: float | None = None, ranks: int | None = None
) -> Result:
    """Search, judge and, with `ranks` for it, train a version with what was found; the same call goes on to `trials`.

    What was found is better when the 95% interval of its paired difference in log loss, on the requests from
    `held_from` on, lies below zero; as days are drawn, these must be a week's at least. Then later retrains use it, and
    the next search compares with it.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes of trials
    began, name, spec = time.monotonic(), task.plan.use_case, parse(task.now)
    if not task.plan.score_from < task.held_from < task.plan.over.until_ms:
        raise InputError("--held-from must lie between --score-from and --until")
    if not (space := spec.kind.space):
        raise InputError(f"learner {task.now!r} declares nothing to vary")
    folder = task.home / "tune" / name
    with alone(folder.parent, name, "search"):
        test = task.backtest(shown=True)
        journal = folder / f"{test.key(spec)}-{task.held_from}.journal"
        search = Search(journal, space, {setting: plain(spec.settings[setting]) for setting in space})
        explore(task, search, trials, jobs, timeout)
        result = judged(test, task, search)
        result |= {"seconds": round(time.monotonic() - began, 1), "code_version": code_version()}
        files = journal.with_suffix("")
        files.mkdir(exist_ok=True)
        (files / "search.json").write_text(json.dumps(result, indent=1) + "\n")
        result["mlflow_run"] = log_run(settings, test, "tune", *_logged(result), files)
    result["version"], result["text"] = challenger(settings, task, result, ranks)
    return result


def plain(value: Any) -> Any:
    """A setting as a search has it: a list of numbers is text."""
    return written({"": value}).removeprefix("=") if isinstance(value, tuple) else value


def judged(test: Backtest, task: Task, search: Search) -> Result:
    """The best settings beside those used now, on requests that the search has not seen."""
    table, best = search.table(), search.best()
    if best is None:
        raise PenstockError("no trial has finished in the time given: give more, the search goes on from here")
    specs = {"best": task.learner(best), "now": parse(task.now)}
    scores = {which: test.scores(f"{task.kind}:{spec.changed}")[0] for which, spec in specs.items()}
    rows, examples, over = test.examples.event_time >= task.held_from, test.examples, task.plan.over
    label, at = examples.label[rows], examples.event_time[rows]
    blocks = {which: comparison.Blocks.of(label, s[rows], at) for which, s in scores.items()}
    (difference,) = comparison.differences(blocks)
    return {
        "use_case": task.plan.use_case,
        "learner": task.kind,
        "range": [iso(t) for t in (over.from_ms, task.plan.score_from, task.held_from, over.until_ms)],
        "settings": {which: spec.changed for which, spec in specs.items()},
        "searched": {"best": search.losses()[best], "now": search.losses().get(search.first)},
        "held_out": {which: comparison.quality(label, s[rows]) for which, s in scores.items()},
        "difference": {what: difference[what] for what in ("auc", "log_loss")},
        "better": difference["log_loss"]["high"] < 0 and len(blocks["now"].loss) >= LEAST_DAYS,
        "finished": sum(t["state"] == "finished" for t in table),
        "stopped": sum(t["state"] == "stopped" for t in table),
        "importances": search.importances(),
        "trials": table,
    }


def _logged(result: Result) -> tuple[dict[str, str], dict[str, float]]:
    """Parameters and metrics of the MLflow run; its files hold the trials."""
    params = {name: str(result[name]) for name in ("learner", "range", "code_version")}
    params |= {f"settings_{which}": text for which, text in result["settings"].items()}
    metrics = {f"{which}_{k}": q[k] for which, q in result["held_out"].items() for k in ("auc", "log_loss", "brier")}
    metrics |= {f"log_loss_difference_{k}": v for k, v in result["difference"]["log_loss"].items()}
    metrics |= {f"importance_{name}": v for name, v in result["importances"].items()}
    metrics |= {name: float(result[name]) for name in ("finished", "stopped", "seconds")}
    return params, {name: value for name, value in metrics.items() if value is not None}


def challenger(settings: Settings, task: Task, result: Result, ranks: int | None) -> tuple[str | None, str]:
    """Keep better settings for retrains and train a version with them now, if there is anything to compare it on."""
    if not result["better"]:
        return None, "not certainly better than the settings used now: they stay"
    if ranks is None or task.kind != "online":
        return None, "better than the settings used now; no version was asked for"
    name, registry = task.plan.use_case, wiring.registry(settings)
    registry.set_settings(name, result["settings"]["best"])
    made = train(settings, name, ranks, unannounced=True)
    ask = f"`penstock rollout {name} consider {made.version}` asks the controller whether it serves"
    return made.version, f"better than the settings used now: retrains use them from here on\n{made}\n{ask}"


def as_text(result: Result) -> str:
    """The result for a terminal."""
    start, scored, held, until = result["range"]
    searched = [figure(result["searched"][which]) for which in ("best", "now")]
    best, now = (result["held_out"][which] for which in ("best", "now"))
    lines = [
        f"{result['finished']} trials finished, {result['stopped']} stopped early, {result['seconds']:.0f} s",
        f"searched on   {scored} to {held}, from {start}",
        f"              log loss {searched[0]} against {searched[1]} of the settings used now",
        f"held out      {held} to {until}, {best['examples']:,} labelled requests, not searched on",
        f"              log loss {figure(best['log_loss'])} against {figure(now['log_loss'])}",
        f"              best less now with 95% intervals by day: {difference(result['difference'])}",
        f"best          {result['settings']['best'] or 'the defaults'}",
        f"importances   {', '.join(f'{k} {v:.2f}' for k, v in result['importances'].items()) or 'too few trials'}",
        f"MLflow        {result['mlflow_run']}",
    ]
    return "\n".join([*lines, result["text"]])
