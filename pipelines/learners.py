"""The learners a backtest knows, by name: `lightgbm`, `lightgbm:every=7d,leaves=31`; `online+lightgbm` is a blend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from features.errors import InputError
from features.usecase import UseCase
from pipelines import baselines
from pipelines.learner import Learner

HOUR_MS, DAY_MS = 3_600_000, 86_400_000


@dataclass(frozen=True)
class Context:
    """What a learner is made for; `score_from` (epoch ms) is when it counts: by then it should have learned."""

    use_case: UseCase
    score_from: int


@dataclass(frozen=True)
class Kind:
    """One kind of learner: its settings with their defaults, how it is made, and how many labels it gets at a time."""

    settings: Mapping[str, Any]
    make: Callable[[Context, Mapping[str, Any]], Learner]
    update_every: int = 256


@dataclass(frozen=True)
class Spec:
    """A learner as it is asked for: its name as written, its kind and all its settings."""

    text: str
    kind: Kind
    settings: Mapping[str, Any]

    def make(self, context: Context) -> Learner:
        return self.kind.make(context, self.settings)


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


def _value(what: str, default: Any, text: str) -> Any:
    """A setting of its default's type; a list of numbers is written 192x96."""
    try:
        return tuple(map(int, text.split("x"))) if isinstance(default, tuple) else type(default)(text)
    except ValueError:
        raise InputError(f"{what} = {text!r}: expected something like {default!r}") from None


def _online() -> Kind:
    from pipelines.online import OnlineNet, OnlineRecipe

    def make(context: Context, settings: Mapping[str, Any]) -> Learner:
        case, recipe = context.use_case, {k: v for k, v in settings.items() if k != "seed"}
        return OnlineNet(case.inputs, len(case.label.targets), case.prior, OnlineRecipe(**recipe), settings["seed"])

    return Kind({f.name: f.default for f in fields(OnlineRecipe)} | {"seed": 0}, make)


def _frozen() -> Kind:
    online = _online()
    return Kind(online.settings, lambda context, s: baselines.Frozen(online.make(context, s), context.score_from))


def _refit(batch: Callable[..., baselines.Batch], settings: dict[str, Any]) -> Kind:
    def make(context: Context, given: Mapping[str, Any]) -> Learner:
        case, every = context.use_case, given["every_days"] * DAY_MS
        fit = batch(**{k: v for k, v in given.items() if k != "every_days"})
        return baselines.Refit(fit, case.inputs, case.prior, every, context.score_from)

    return Kind({"every_days": 28} | settings, make)


def _river(context: Context, settings: Mapping[str, Any]) -> Learner:
    return baselines.River(context.use_case.inputs, context.use_case.prior, **settings)


def _rate(context: Context, settings: Mapping[str, Any]) -> Learner:
    return baselines.RollingRate(context.use_case.prior, settings["hours"] * HOUR_MS)


TREES = {"rounds": 400, "leaves": 31, "rate": 0.03, "seed": 0}
KINDS: dict[str, Callable[[], Kind]] = {
    "online": _online,
    "frozen": _frozen,
    "lightgbm": lambda: _refit(baselines.lightgbm, TREES | {"least": 200, "columns": 0.3, "l2": 10.0}),
    "sklearn": lambda: _refit(baselines.sklearn_trees, TREES),
    "river": lambda: Kind({"rate": 0.003, "l2": 0.0}, _river),
    "rate": lambda: Kind({"hours": 24}, _rate, 16),
    "constant": lambda: Kind({}, lambda context, settings: baselines.Constant(context.use_case.prior), 16),
}
