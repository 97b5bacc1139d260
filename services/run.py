"""`penstock run`: one or more steps in this process, each on its own thread with its own consumer group."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from features.errors import ConfigError, PenstockError
from features.usecase import UseCase, load
from pipelines.checkpoint import watermark_of
from pipelines.runner import CommitPolicy, Runner
from services import metrics, rollout, wiring
from services.progress import iso
from services.settings import Settings

STEPS = ("featurizer", "joiner", "scorer", "learner", "control", "drift")


def run(settings: Settings, steps: str, use_case_name: str, *, once: bool = False) -> None:
    """Run `steps` (joined by +) until stopped, or with `once` to the end that their input has now."""
    names = steps.split("+")
    if unknown := sorted(set(names) - set(STEPS)):
        raise ConfigError(f"no step {', '.join(unknown)}: choose from {', '.join(STEPS)}, several joined by +")
    use_case = load(use_case_name)
    counted = metrics.StepMetrics()
    runners = [_runner(settings, use_case, name, counted) for name in names]
    if settings.metrics_port:
        metrics.serve(counted.registry, settings.metrics_host, settings.metrics_port)
    if "control" in names and not once:
        from services import dashboard

        dashboard.start(settings, use_case.name, counted)
    _work(runners, once)
    if once:
        print("; ".join(map(_reached, runners)))


def _reached(runner: Runner) -> str:
    """How far a step has committed, in words."""
    mark = watermark_of(runner.broker, runner.group, runner.use_case.partitions)
    return f"{runner.group} is at {'the start' if mark is None else iso(mark)}"


def _runner(settings: Settings, use_case: UseCase, name: str, counted: metrics.StepMetrics) -> Runner:
    make_step, extras = _step(settings, use_case, name)
    return Runner(
        wiring.broker(settings),
        use_case,
        make_step,
        settings.state_url,
        policy=CommitPolicy.every(settings.commit_interval_s),
        idle_timeout=settings.idle_timeout_s,
        on_measured=counted.count,
        **extras,
    )


def _step(settings: Settings, use_case: UseCase, name: str) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """How to make a step, and what its runner needs beside it."""
    if name == "featurizer":
        from pipelines.backfill import Adoption
        from pipelines.featurizer import Featurizer

        adoption = Adoption(wiring.broker(settings), use_case, settings.state_url)
        extras = {"store": wiring.feature_store(settings, use_case), "adoption": adoption}
        return lambda partition: Featurizer(use_case), extras
    if name == "joiner":
        from pipelines.joiner import Joiner

        return lambda partition: Joiner(use_case, partition), {}
    if name == "drift":
        from pipelines.drift import Drift

        return lambda partition: Drift(use_case, partition), {"rejects": False}
    if name == "control":
        from pipelines.control import ControlStep
        from pipelines.rollout import POLICIES
        from services.control import Mirror

        if settings.rollout_policy not in POLICIES:
            raise ConfigError(f"setting rollout_policy: {settings.rollout_policy!r} is none of {', '.join(POLICIES)}")
        policy = POLICIES[settings.rollout_policy]()

        def recover() -> bytes:
            return json.dumps(rollout.status(settings, use_case.name)).encode()

        extras = {"on_commit": Mirror(settings, use_case.name), "recover": recover}
        return lambda partition: ControlStep(use_case, policy), extras
    if name == "learner":
        from services.learning import Registrar, make_learner

        extras = {"whole": True, "rejects": False, "on_commit": Registrar(settings, use_case)}
        return make_learner(settings, use_case), extras
    from services.scoring import make_scorer

    return make_scorer(settings, use_case), {}


def _work(runners: Sequence[Runner], once: bool) -> None:
    """One thread per runner; the first error stops all and is raised."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def work(runner: Runner) -> None:
        try:
            runner.run(stop, once=once)
        except BaseException as error:  # handed to the main thread, which raises it
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(r,), name=r.name) for r in runners]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.2)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    for error in errors:
        if not isinstance(error, PenstockError):
            raise error
    if errors:
        raise errors[0]
