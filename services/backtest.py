"""`penstock backtest`: learners over a range of the past, each example predicted before its label is learned."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import InputError, UnavailableError
from features.usecase import load
from pipelines import archive, comparison
from pipelines.archive import Examples
from pipelines.backtest import Progress as Position
from pipelines.backtest import blended, run
from pipelines.learners import Context, Spec, parse
from services import backtest_data
from services.backtest_data import Made, Range
from services.progress import Progress, iso
from services.settings import Settings
from services.source import source_of
from services.train import code_version, run_job

Result = dict[str, Any]
SAVE_S = 60.0
MS = timedelta(milliseconds=1)
LEARNERS = ("archive", "backtest", "baselines", "learners", "net", "online", "retrain", "training", "trees")
LEARNER_CODE = ("features/*.py", *(f"pipelines/{name}.py" for name in LEARNERS))
FIRST_SCORED_MS = 31 * 86_400_000


@dataclass(frozen=True)
class Chosen:
    """How the default settings were chosen: looking at nothing from `before` (epoch ms) on, among so many
    configurations."""

    before: int
    configurations: int


CHOSEN = {"flights": Chosen(1_372_636_800_000, 20)}


@dataclass(frozen=True)
class Plan:
    """One backtest; times in epoch ms, durations in ms.

    learners : names with settings; + joins the parts of a blend
    score_from : requests before it are learned from and not scored
    update_every : labels a learner gets at a time; 0 is the learner's own
    permute, delay, leak : labels dealt out at random, labels that come later, the label among the inputs
    """

    use_case: str
    over: Range
    score_from: int
    learners: tuple[str, ...] = ("online",)
    update_every: int = 0
    permute: bool = False
    delay: int = 0
    leak: bool = False

    def check(self) -> Plan:
        """This plan, or InputError naming what can't be."""
        over = self.over
        if not over.from_ms <= self.score_from < over.until_ms:
            raise InputError("--score-from must lie between --from and --until")
        if backtest_data.DAY_MS % over.tick:
            raise InputError("--tick must divide a day: 1m, 15m or 1h do")
        for text in self.learners:
            for part in text.split("+"):
                parse(part)
        return self


def default_score_from(over: Range) -> int:
    """After the first 31 days, or the first third of a shorter range."""
    return over.from_ms + min(FIRST_SCORED_MS, (over.until_ms - over.from_ms) // 3)


class Backtest:
    """The learners' scores of one plan; what is computed is kept below `home`, so a second run goes on from there.
    Its examples are `made`, or those of the plan's range."""

    def __init__(self, home: Path, plan: Plan, shown: bool = True, made: Made | None = None) -> None:
        self.home, self.plan, self.shown = home / "backtest" / plan.use_case, plan.check(), shown
        self.use_case = backtest_data.only(load(plan.use_case), plan.leak)
        say = self.progress("days")
        say.line("examples")
        self.made = made or backtest_data.examples(
            self.home, load(plan.use_case), source_of(plan.use_case), plan.over, say
        )
        self.examples = self._load()
        self.scored = self.examples.event_time >= plan.score_from

    def progress(self, unit: str) -> Progress:
        return Progress(self.plan.over.from_ms, self.plan.over.until_ms, self.shown, unit=unit)

    def _load(self) -> Examples:
        targets = tuple(self.use_case.label.targets)
        found = archive.load(self.made.files, self.use_case.inputs, 0, 2**62, targets)
        if not len(found):
            raise InputError("no labelled request in this range")
        if self.plan.permute:
            order = np.random.default_rng(0).permutation(len(found))
            found = replace(found, label=found.label[order], targets=found.targets[order])
        return replace(found, label_time=found.label_time + self.plan.delay)

    def scores(self, text: str) -> tuple[Any, float]:
        """A learner's scores [n] of all examples, and the seconds that the scored part took it."""
        parts = [self._learned(parse(part)) for part in text.split("+")]
        return parts[0] if len(parts) == 1 else (blended([s for s, _ in parts]), sum(t for _, t in parts))

    def _learned(self, spec: Spec) -> tuple[Any, float]:
        path = self.home / "scores" / f"{self.key(spec)}.npz"
        if path.exists():
            with np.load(path) as kept:
                return kept["scores"], float(kept["seconds"])
        path.parent.mkdir(parents=True, exist_ok=True)
        say = self.progress("updates")
        say.line(f"learner {spec.text}")
        learner = spec.make(self.context(path.with_suffix("")))
        kept = Kept(path.with_suffix(".part"), self.plan.score_from, learner.snapshot, say)
        position = kept.resume(learner.restore)
        scores = run(learner, self.examples, *self.pace(spec), position, kept.turned)
        _save(path, scores=scores, seconds=kept.seconds)
        kept.path.unlink(missing_ok=True)
        return scores, kept.seconds

    def context(self, folder: Path) -> Context:
        """What learners of this backtest are made for; `folder` takes the files of one that has some."""
        return Context(self.use_case, self.plan.score_from, self.made.files, folder, run_job)

    def pace(self, spec: Spec) -> tuple[int, int, int]:
        """How a learner gets its labels: `every`, `tick_ms` and `period_ms` of `pipelines.backtest.run`."""
        every = self.plan.update_every or spec.kind.update_every
        return every, self.plan.over.tick, self.use_case.retrain_every // MS if spec.kind.at_cuts else 0

    def key(self, spec: Spec) -> str:
        """Names all that the scores follow from."""
        plan = {k: v for k, v in asdict(self.plan).items() if k not in ("learners", "update_every")}
        name = spec.text.partition(":")[0]
        what = [plan, name, dict(spec.settings), self.pace(spec)[0], self.made.name]
        text = json.dumps([*what, self.use_case.inputs.as_json(), backtest_data.code_hash(LEARNER_CODE)])
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def events_per_s(self, seconds: float) -> float:
        """Events and requests of the scored part by second of making its features and of a learner's work."""
        days = [d for d in self.made.days if self.plan.score_from <= d[0] < self.plan.over.until_ms]
        return round(sum(d[1] for d in days) / max(1e-9, seconds + sum(d[2] for d in days)), 1)


class Kept:
    """A learner on its way: written now and then, so that a run that was stopped goes on."""

    def __init__(self, path: Path, score_from: int, snapshot: Callable[[], bytes], say: Progress) -> None:
        self.path, self.score_from, self.snapshot, self.say = path, score_from, snapshot, say
        self.seconds, self.last = 0.0, time.monotonic()
        self.saved = self.last

    def resume(self, restore: Callable[[bytes], None]) -> Position | None:
        """Where an earlier run stopped, with the learner as it was."""
        if not self.path.exists():
            return None
        with np.load(self.path) as kept:
            restore(kept["learner"].tobytes())
            self.seconds = float(kept["seconds"])
            position = Position(int(kept["turns"]), kept["scores"])
        self.say.line(f"goes on after {position.turns:,} updates")
        self.last = self.saved = time.monotonic()
        return position

    def turned(self, position: Position, now_ms: int) -> None:
        """After each turn."""
        now = time.monotonic()
        self.seconds += now - self.last if now_ms >= self.score_from else 0.0
        if now - self.saved > SAVE_S:
            learner = np.frombuffer(self.snapshot(), np.uint8)
            _save(self.path, scores=position.scores, turns=position.turns, seconds=self.seconds, learner=learner)
            self.saved = time.monotonic()
        self.last = time.monotonic()
        self.say.update(min(now_ms, self.say.until_ms - 1))


def _save(path: Path, **arrays: Any) -> None:
    """All or nothing."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def backtest(settings: Settings, plan: Plan) -> Result:
    """Run a plan: its result, written as JSON and HTML below `home` and logged as an MLflow run."""
    began = time.monotonic()
    test = Backtest(settings.home, plan)
    found = {text: test.scores(text) for text in plan.learners}
    result = report(test, {text: scores for text, (scores, _) in found.items()})
    for text, (_, seconds) in found.items():
        result["learners"][text]["events_per_s"] = test.events_per_s(seconds)
    first = result["learners"][plan.learners[0]]
    result |= {name: first[name] for name in ("auc", "log_loss", "brier", "events_per_s", "months")}
    result |= {"features_s": test.made.seconds, "seconds": round(time.monotonic() - began, 1)}
    result["code_version"] = code_version()
    return _published(settings, test, result)


def report(test: Backtest, scores: Mapping[str, Any]) -> Result:
    """What is said of scores of all examples, by learner."""
    plan, examples = test.plan, test.examples
    chosen = CHOSEN.get(plan.use_case)
    parts = {"all": test.scored}
    if chosen and plan.score_from < chosen.before < plan.over.until_ms:
        before = examples.event_time < chosen.before
        parts |= {"chosen_on": test.scored & before, "held_out": ~before}
    found = {text: measured(examples, score, parts) for text, score in scores.items()}
    blocks = {
        name: {t: comparison.Blocks.of(examples.label[r], s[r], examples.event_time[r]) for t, s in scores.items()}
        for name, r in parts.items()
        if len(scores) > 1
    }
    return {
        "use_case": plan.use_case,
        "from": iso(plan.over.from_ms),
        "until": iso(plan.over.until_ms),
        "score_from": iso(plan.score_from),
        "tick_ms": plan.over.tick if plan.over.tick > 1 else None,
        "examples": len(examples),
        "scored": int(test.scored.sum()),
        "refused_events": test.made.refused,
        "settings_chosen_before": iso(chosen.before) if chosen else None,
        "configurations_tried": chosen.configurations if chosen else None,
        "learners": found,
        "differences": {name: comparison.differences(of) for name, of in blocks.items()},
    }


def measured(examples: Examples, score: Any, parts: Mapping[str, Any]) -> Result:
    """One learner's figures over the scored part, by month, and of the range its settings were not chosen on."""
    label, rows = examples.label, parts["all"]
    months = comparison.by_month(label[rows], score[rows], examples.event_time[rows])
    found = comparison.quality(label[rows], score[rows]) | {"months": months}
    found["calibration"] = comparison.calibration(label[rows], score[rows])
    return found | {n: comparison.quality(label[r], score[r]) for n, r in parts.items() if n != "all"}


def _published(settings: Settings, test: Backtest, result: Result) -> Result:
    from services.backtest_page import page

    folder = test.home / "report"
    folder.mkdir(parents=True, exist_ok=True)
    result |= {"report": str(folder / "report.html"), "mlflow_run": None}
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "report.html").write_text(page(result))
    params, metrics = _params(test, result), _metrics(result)
    result["mlflow_run"] = log_run(settings, test, "backtest", params, metrics, folder)
    return result


def _params(test: Backtest, result: Result) -> dict[str, str]:
    plan = asdict(test.plan)
    params = {k: str(v) for k, v in (plan | plan.pop("over")).items()} | {"code_version": result["code_version"]}
    for text in test.plan.learners:
        for part in text.split("+"):
            params |= {f"{part.partition(':')[0]}.{k}": str(v) for k, v in parse(part).settings.items()}
    return params


def _metrics(result: Result) -> dict[str, float]:
    metrics = {k: result[k] for k in ("auc", "log_loss", "brier", "events_per_s") if result[k] is not None}
    for i, figures in enumerate(result["learners"].values()):
        metrics |= {f"learner_{i}_{k}": figures[k] for k in ("auc", "log_loss", "brier") if figures[k] is not None}
    return metrics


def log_run(
    settings: Settings, test: Backtest, what: str, params: dict[str, str], metrics: dict[str, float], folder: Path
) -> str:
    """Log an MLflow run at the server when it answers, else in a database below `home`; says where."""
    from pipelines.registry import Registry

    local = f"sqlite:///{(test.home / 'mlflow.db').resolve()}"
    for url, artifacts in ((settings.mlflow_url, None), (local, (test.home / "mlruns").resolve().as_uri())):
        try:
            _, run_id = Registry(url).log_run(f"{test.plan.use_case}_{what}", params, metrics, folder, artifacts)
            return f"{run_id} at {url}"
        except UnavailableError:
            if url == local:
                raise
            test.progress("").line(f"MLflow at {url} does not answer: the run is logged in {local}")
    raise AssertionError("one of both is there")


def as_text(result: Result) -> str:
    """The result as a table for a terminal."""
    lines = [
        f"{result['score_from']} to {result['until']}, {result['scored']:,} labelled requests",
        f"{'learner':<40} AUC     log loss Brier   calibration error  events/s",
    ]
    for text, q in result["learners"].items():
        error = figure(q["calibration"]["error"])
        lines.append(f"{text:<40} {_figures(q)}   {error}              {q['events_per_s']:>9,.0f}")
    held = [(t, q["held_out"]) for t, q in result["learners"].items() if "held_out" in q]
    if held:
        lines += ["", f"from {result['settings_chosen_before']} on, on which no setting was chosen"]
        lines += [f"{text:<40} {_figures(q)}" for text, q in held]
    for part, found in result["differences"].items():
        lines += ["", f"paired differences with 95% intervals by day ({part.replace('_', ' ')})"]
        lines += [f"{d['learner']} less {d['against']}: {difference(d)}" for d in found]
    lines += ["", "month    examples   " + "   ".join(f"{t[:18]:<18}" for t in result["learners"])]
    for i, month in enumerate(result["months"]):
        each = [q["months"][i] for q in result["learners"].values()]
        shown = "   ".join(f"{figure(m['auc'])} {figure(m['log_loss'])}".ljust(18) for m in each)
        lines.append(f"{month['month']}  {month['examples']:>8,}   {shown}")
    return "\n".join([*lines, "", f"report  {result['report']}", f"MLflow  {result['mlflow_run']}"])


def difference(d: Mapping[str, Any]) -> str:
    """A paired difference in words."""
    parts = [(name, d[name.replace(" ", "_").lower()]) for name in ("AUC", "log loss")]
    return ", ".join(f"{n} {f['difference']:+.4f} ({f['low']:+.4f} to {f['high']:+.4f})" for n, f in parts)


def _figures(q: Mapping[str, Any]) -> str:
    return "   ".join(figure(q[name]) for name in ("auc", "log_loss", "brier"))


def figure(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.4f}".removeprefix("0")
