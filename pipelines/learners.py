"""The learners a backtest knows, by name: `lightgbm`, `lightgbm:every=7d,leaves=31`; `online+lightgbm` is a blend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from features.errors import InputError
from features.usecase import UseCase
from pipelines import baselines
from pipelines.job import Job, OnlineRecipe
from pipelines.learner import Learner

HOUR_MS, DAY_MS = 3_600_000, 86_400_000


@dataclass(frozen=True)
class Context:
    """What a learner is made for.

    score_from : when it counts (epoch ms): by then it should have learned
    files, folder, train : of the one that retrains as live does; see `pipelines.retrain`
    """

    use_case: UseCase
    score_from: int
    files: tuple[str, ...] = ()
    folder: Path = Path()
    train: Callable[[Job, Path, int], object] | None = None  # with so many ranks


@dataclass(frozen=True)
class Span:
    """What a number may be in a search, both ends included; whole when they are. `log`: it matters by its factor."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, Span | tuple[str, ...]]  # of settings; or one of these, as they are written


@dataclass(frozen=True)
class Kind:
    """One kind of learner: its settings with their defaults, how it is made, and how many labels it gets at a time;
    one that learns `at_cuts` gets those of a whole cut. `space`: what a search varies."""

    settings: Mapping[str, Any]
    make: Callable[[Context, Mapping[str, Any]], Learner]
    update_every: int = 256
    at_cuts: bool = False
    space: Space = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """A learner as it is asked for: its name as written, its kind and all its settings."""

    text: str
    kind: Kind
    settings: Mapping[str, Any]

    def make(self, context: Context) -> Learner:
        return self.kind.make(context, self.settings)

    @property
    def changed(self) -> str:
        """The settings that are not the kind's defaults, as `parse` reads them after the name."""
        return written({k: v for k, v in self.settings.items() if v != self.kind.settings[k]})


def parse(text: str) -> Spec:
    """One learner, `NAME` or `NAME:setting=value,...`; InputError names what is wrong."""
    name, _, given = text.partition(":")
    if name not in KINDS:
        raise InputError(f"no learner {name!r}: known are {', '.join(KINDS)}; + between two blends them")
    kind = KINDS[name]()
    settings = dict(kind.settings)
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        if key not in settings:
            raise InputError(f"learner {name!r} has no setting {key!r}: it has {', '.join(settings) or 'none'}")
        settings[key] = _value(f"{name}:{key}", settings[key], value)
    return Spec(text, kind, settings)


def written(settings: Mapping[str, Any]) -> str:
    """Settings as `parse` reads them after the name."""
    texts = {k: "x".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in settings.items()}
    return ",".join(f"{k}={v}" for k, v in texts.items())


def online_recipe(settings: str) -> OnlineRecipe:
    """The recipe of the learner `online` with these settings."""
    return OnlineRecipe(**{k: v for k, v in parse(f"online:{settings}").settings.items() if k != "seed"})


def _value(what: str, default: Any, text: str) -> Any:
    """A setting of its default's type; a list of numbers is written 192x96."""
    try:
        return tuple(map(int, text.split("x"))) if isinstance(default, tuple) else type(default)(text)
    except ValueError:
        raise InputError(f"{what} = {text!r}: expected something like {default!r}") from None


def _online() -> Kind:
    def make(context: Context, settings: Mapping[str, Any]) -> Learner:
        from pipelines.online import OnlineNet

        case, recipe = context.use_case, {k: v for k, v in settings.items() if k != "seed"}
        return OnlineNet(case.inputs, len(case.label.targets), case.prior, OnlineRecipe(**recipe), settings["seed"])

    return Kind({f.name: f.default for f in fields(OnlineRecipe)} | {"seed": 0}, make, space=ONLINE)


def _frozen() -> Kind:
    online = _online()
    return Kind(online.settings, lambda context, s: baselines.Frozen(online.make(context, s), context.score_from))


def _retrain(context: Context, settings: Mapping[str, Any]) -> Learner:
    from pipelines.retrain import Retrain

    train = context.train
    assert train
    return Retrain(context.use_case, context.files, context.folder, lambda job, at: train(job, at, settings["ranks"]))


def _refit(batch: Callable[..., baselines.Batch], settings: dict[str, Any]) -> Kind:
    def make(context: Context, given: Mapping[str, Any]) -> Learner:
        case, every = context.use_case, given["every_days"] * DAY_MS
        fit = batch(**{k: v for k, v in given.items() if k != "every_days"})
        return baselines.Refit(fit, case.inputs, case.prior, every, context.score_from)

    return Kind({"every_days": 28} | settings, make, space=BOOSTED)


def _river(context: Context, settings: Mapping[str, Any]) -> Learner:
    return baselines.River(context.use_case.inputs, context.use_case.prior, **settings)


def _rate(context: Context, settings: Mapping[str, Any]) -> Learner:
    return baselines.RollingRate(context.use_case.prior, settings["hours"] * HOUR_MS)


ONLINE: Space = {
    "first_rate": Span(2e-4, 4e-3, log=True),
    "rate": Span(5e-5, 3e-3, log=True),
    "weight_decay": Span(1e-3, 10.0, log=True),
    "target_weight": Span(0.3, 10.0, log=True),
    "replay": Span(1, 8),
    "members": Span(1, 6),
    "hidden": ("96x48", "192x96", "256x128"),
    "trees": Span(50, 400),
}
BOOSTED: Space = {"rounds": Span(20, 800, log=True), "leaves": Span(4, 63, log=True), "rate": Span(0.01, 0.3, log=True)}
TREES = {"rounds": 400, "leaves": 31, "rate": 0.03, "seed": 0}
KINDS: dict[str, Callable[[], Kind]] = {
    "online": _online,
    "frozen": _frozen,
    "retrain": lambda: Kind({"ranks": 1}, _retrain, at_cuts=True),
    "lightgbm": lambda: _refit(baselines.lightgbm, TREES | {"least": 200, "columns": 0.3, "l2": 10.0}),
    "sklearn": lambda: _refit(baselines.sklearn_trees, TREES),
    "river": lambda: Kind({"rate": 0.0002, "l2": 0.0}, _river),
    "rate": lambda: Kind({"hours": 24}, _rate, 16),
    "constant": lambda: Kind({}, lambda context, settings: baselines.Constant(context.use_case.prior), 16),
}
