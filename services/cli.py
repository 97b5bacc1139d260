"""The `penstock` command. Each command parses its arguments and calls one function, imported when it runs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Annotated, Any

import typer

from features.errors import PenstockError
from services.settings import Settings

app = typer.Typer(
    name="penstock",
    help="Streaming features, online learning and continuous rollout on Kafka, Feast, Horovod, MLflow and Airflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
UseCaseName = Annotated[str, typer.Argument(metavar="USE_CASE", help="Name of a module in features/, such as flights.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output; logs go to standard error.")]


def parse_day(text: str) -> datetime:
    """A UTC instant from YYYY-MM-DD or RFC 3339."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no date: write 2013-01-31 or 2013-01-31T12:00:00Z") from None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def parse_duration(text: str) -> timedelta:
    """A duration from 90s, 15m, 1h or 7d."""
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    if len(text) < 2 or text[-1] not in units or not text[:-1].isdigit() or int(text[:-1]) == 0:
        raise typer.BadParameter(f"{text!r} is no duration: write 90s, 15m, 1h or 7d")
    return timedelta(**{units[text[-1]]: int(text[:-1])})


def parse_compression(text: str) -> str:
    """A recipe's compression."""
    from pipelines.job import Recipe

    try:
        return Recipe(compression=text).compression
    except PenstockError as error:
        raise typer.BadParameter(str(error)) from None


class Requests(StrEnum):
    http = "http"
    topic = "topic"


class Bench(StrEnum):
    features = "features"
    freshness = "freshness"
    learning = "learning"
    rollout = "rollout"
    serving = "serving"
    training = "training"


class Action(StrEnum):
    status = "status"
    consider = "consider"
    promote = "promote"
    rollback = "rollback"


def progress_on_stderr() -> contextlib.redirect_stdout[Any]:
    """Standard output is for the result alone."""
    return contextlib.redirect_stdout(sys.stderr)


def show(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a command's result: one JSON object, or its text."""
    print(json.dumps(result) if as_json else text)


@app.command()
def up(
    use_cases: Annotated[list[str] | None, typer.Argument(metavar="[USE_CASE]...", help="Default: flights.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when everything is ready.")] = False,
    learner: Annotated[bool, typer.Option(help="The continuous learner, too.")] = True,
    env: Annotated[bool, typer.Option("--env", help="Print `export` lines for a shell, start nothing.")] = False,
) -> None:
    """Start the embedded stack: Kafka, PostgreSQL, Redis, MLflow, Airflow and our processes, on loopback."""
    from services import stack

    if env:
        for name, value in stack.env(Settings.load()).items():
            print(f"export {name}={shlex.quote(value)}")
        return
    sys.exit(stack.up(Settings.load(), use_cases or ["flights"], detach=detach, learner=learner))


@app.command()
def down() -> None:
    """Stop the embedded stack and every process of it."""
    from services import stack

    sys.exit(stack.down(Settings.load()))


@app.command()
def status(as_json: Json = False, use_case: UseCaseName = "flights") -> None:
    """What runs; lag, watermarks and rejected events of the steps; versions and roles."""
    from services import status as report

    result = report.status(Settings.load(), use_case)
    show(result, as_json, report.as_text(result))


@app.command()
def replay(
    use_case: UseCaseName,
    from_: Annotated[datetime, typer.Option("--from", parser=parse_day, metavar="DATE", help="UTC, included.")],
    until: Annotated[datetime, typer.Option("--until", parser=parse_day, metavar="DATE", help="UTC, excluded.")],
    speed: Annotated[float | None, typer.Option(min=0.001, help="Simulated seconds per second.")] = None,
    lockstep: Annotated[bool, typer.Option("--lockstep", help="Tick by tick, as fast as the steps follow.")] = False,
    tick: Annotated[timedelta, typer.Option(parser=parse_duration, metavar="DURATION")] = "15m",  # type: ignore[assignment]
    requests: Annotated[Requests, typer.Option(help="Where scoring requests go.")] = Requests.http,
    as_json: Json = False,
) -> None:
    """Send a use case's recorded events and requests again, in event-time order. Lockstep unless a speed is given."""
    from features.usecase import load
    from services.replay import replay
    from services.source import source_of

    if lockstep and speed is not None:
        raise typer.BadParameter("choose one of --lockstep and --speed")
    source = source_of(use_case)
    with progress_on_stderr():
        done = replay(
            Settings.load(), load(use_case), source, from_, until, tick=tick, speed=speed, requests=requests.value
        )
    show(done.as_json(), as_json, str(done))


@app.command()
def run(
    steps: Annotated[
        str, typer.Argument(metavar="STEP[+STEP]", help="featurizer, joiner, scorer, learner, control, drift.")
    ],
    use_case: UseCaseName,
    once: Annotated[bool, typer.Option("--once", help="Stop at the end that the input has now.")] = False,
) -> None:
    """Run steps of a use case in this process, until stopped."""
    from services.run import run

    if "learner" in steps.split("+"):
        WithoutTorch.end()
    run(Settings.load(), steps, use_case, once=once)


@app.command()
def serve(
    use_case: UseCaseName, port: Annotated[int, typer.Option(min=0, max=65535, help="0: the default.")] = 0
) -> None:
    """Run the predictor: POST /predict, /readyz, /metrics, /docs."""
    from services.serve import serve

    serve(Settings.load(), use_case, port)


@app.command()
def train(
    use_case: UseCaseName,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Horovod processes.")] = 2,
    compression: Annotated[
        str | None,
        typer.Option(
            parser=parse_compression, metavar="none|fp16|powersgd:RANK", help="Of gradients; else the setting's."
        ),
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Horovod's timeline, a Chrome trace.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Retrain up to the newest cut with Horovod, evaluate, register a version. No new cut: one line, success."""
    from services.train import train

    settings = Settings.load()
    with progress_on_stderr():
        result = train(
            replace(settings, train_compression=compression or settings.train_compression), use_case, ranks, timeline
        )
    show(result.as_json(), as_json, str(result))


@app.command()
def rollout(
    use_case: UseCaseName,
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.status,
    version: Annotated[str | None, typer.Argument(help="Of consider and promote: the version's number.")] = None,
    why: Annotated[str, typer.Option(help="Recorded with the decision.")] = "",
    as_json: Json = False,
) -> None:
    """Show what serves and why, or ask the controller to consider, promote or roll back; waits for its decision."""
    from services import rollout

    if (version is None) is (action in (Action.consider, Action.promote)):
        raise typer.BadParameter("consider and promote need a version, status and rollback take none")
    settings = Settings.load()
    if action is Action.status:
        state = rollout.status(settings, use_case)
        show(state, as_json, rollout.as_text(state))
        return
    decision = rollout.send(settings, use_case, action.value, version, why)
    show(decision, as_json, decision["sentence"])


@app.command()
def schemas(use_case: UseCaseName) -> None:
    """Print every topic's records as JSON Schema, in one AsyncAPI 3 document."""
    from features.usecase import load
    from services.schemas import document

    print(json.dumps(document(load(use_case)), indent=1))


@app.command()
def register(
    use_case: UseCaseName,
    folder: Annotated[Path, typer.Argument(help="Holds a model.onnx.", exists=True, file_okay=False)],
    learned_until: Annotated[
        datetime,
        typer.Option(parser=parse_day, metavar="DATE", help="It has learned labels up to here; newer ones judge it."),
    ],
    as_json: Json = False,
) -> None:
    """Make a version of a model of your own: any ONNX graph that reads the declared inputs. Then have it considered."""
    from services.register import register

    with progress_on_stderr():
        version = register(Settings.load(), use_case, folder, round(learned_until.timestamp() * 1000))
    show({"version": version}, as_json, f"registered version {version} of {use_case}")


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the state of an earlier demo first.")] = False,
    attach: Annotated[bool, typer.Option("--attach", help="Replay into the stack that the settings name.")] = False,
    tick: Annotated[timedelta, typer.Option(parser=parse_duration, metavar="DURATION")] = "15m",  # type: ignore[assignment]
    as_json: Json = False,
) -> None:
    """The whole loop on real flights, 1 January to 15 February 2013, ending with a report."""
    from services.demo import demo

    sys.exit(demo(Settings.load(), keep=keep, fresh=fresh, attach=attach, tick=tick, as_json=as_json))


@app.command()
def audit(use_case: UseCaseName, as_json: Json = False) -> None:
    """Check what was served: vectors recomputed from the raw events, no version that learned from the future."""
    from features.usecase import load
    from services.audit import as_text, audit

    with progress_on_stderr():
        checks = audit(Settings.load(), load(use_case))
    show({"checks": checks}, as_json, as_text(checks))
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)


@app.command()
def backtest(
    use_case: UseCaseName,
    from_: Annotated[datetime, typer.Option("--from", parser=parse_day, metavar="DATE", help="UTC, included.")],
    until: Annotated[datetime, typer.Option("--until", parser=parse_day, metavar="DATE", help="UTC, excluded.")],
    score_from: Annotated[
        datetime | None, typer.Option(parser=parse_day, metavar="DATE", help="Default: after the first 31 days.")
    ] = None,
    learner: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:setting=value,...]", help="Again for more; A+B blends. Default: online."),
    ] = None,
    tick: Annotated[
        timedelta | None, typer.Option(parser=parse_duration, metavar="DURATION", help="Windows as in a lockstep.")
    ] = None,
    update_every: Annotated[int, typer.Option(min=0, help="Labels learned at a time; 0: the learner's own.")] = 0,
    stale: Annotated[
        timedelta | None, typer.Option(parser=parse_duration, metavar="DURATION", help="Windows as of so much before.")
    ] = None,
    delay_labels: Annotated[timedelta | None, typer.Option(parser=parse_duration, metavar="DURATION")] = None,
    permute_labels: Annotated[bool, typer.Option("--permute-labels", help="Nothing can be learned then.")] = False,
    plant_leak: Annotated[bool, typer.Option("--plant-leak", help="Let the model read the label.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Run all of these; fail when one is not noticed.")] = False,
    as_json: Json = False,
) -> None:
    """Learners over the past in event-time order: each request is scored before its label is learned."""
    start, end, first = (None if at is None else round(at.timestamp() * 1000) for at in (from_, until, score_from))
    ticked, staled, delayed = (d // timedelta(milliseconds=1) if d else 0 for d in (tick, stale, delay_labels))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of these small steps mostly wait for each other
    WithoutTorch.end()
    from services import backtest as runs
    from services import backtest_check
    from services.backtest_data import Range

    over = Range(start or 0, end or 0, ticked or 1, staled)
    plan = runs.Plan(
        use_case,
        over,
        runs.default_score_from(over) if first is None else first,
        tuple(learner or ["online"]),
        update_every,
        permute_labels,
        delayed,
        plant_leak,
    )
    with progress_on_stderr():
        result = (backtest_check.check if check else runs.backtest)(Settings.load(), plan)
    show(result, as_json, backtest_check.as_text(result) if check else runs.as_text(result))
    if not all(c["ok"] for c in result.get("checks", ())):
        raise typer.Exit(1)


@app.command()
def tune(
    use_case: UseCaseName,
    trials: Annotated[int, typer.Option(min=1, help="In all: the same command again goes on to so many.")] = 20,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Processes of one thread.")] = 2,
    timeout: Annotated[
        timedelta | None, typer.Option(parser=parse_duration, metavar="DURATION", help="No more trials after it.")
    ] = None,
    learner: Annotated[str, typer.Option(metavar="NAME[:setting=value,...]", help="Whose settings.")] = "online",
    from_: Annotated[
        datetime | None,
        typer.Option("--from", parser=parse_day, metavar="DATE", help="Of recorded data; else the live examples."),
    ] = None,
    until: Annotated[datetime | None, typer.Option(parser=parse_day, metavar="DATE", help="UTC, excluded.")] = None,
    score_from: Annotated[
        datetime | None, typer.Option(parser=parse_day, metavar="DATE", help="Default: after the first 31 days.")
    ] = None,
    held_from: Annotated[
        datetime | None, typer.Option(parser=parse_day, metavar="DATE", help="The search sees nothing after it.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Horovod processes of the challenger.")] = 2,
    challenger: Annotated[bool, typer.Option(help="Train a version with settings that are better.")] = True,
    as_json: Json = False,
) -> None:
    """Search for better settings over backtests; judge them on later requests; train a challenger with them."""
    if (from_ is None) is not (until is None):
        raise typer.BadParameter("--from and --until go together; without both, the live examples are searched on")
    WithoutTorch.end()
    from services import tune as search

    settings = Settings.load()
    start, end, first, held = (
        None if at is None else round(at.timestamp() * 1000) for at in (from_, until, score_from, held_from)
    )
    with progress_on_stderr():
        task = search.make_task(settings, use_case, learner, start, end, first, held, challenger)
        seconds = timeout.total_seconds() if timeout else None
        result = search.tune(settings, task, trials, jobs, seconds, ranks if challenger else None)
    show(result, as_json, search.as_text(result))


@app.command()
def backfill(
    use_case: UseCaseName,
    view: Annotated[str, typer.Option(help="The stream feature view that is new or was changed.")],
    from_: Annotated[
        datetime | None, typer.Option("--from", parser=parse_day, metavar="DATE", help="Events before don't count.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(parser=parse_day, metavar="DATE", help="Stop there; a later run goes on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute a view over history with the engine that serves it; a running featurizer then takes it over."""
    from features.usecase import load
    from services.backfill import backfill

    from_ms, until_ms = (None if at is None else round(at.timestamp() * 1000) for at in (from_, until))
    with progress_on_stderr():
        result = backfill(Settings.load(), load(use_case), view, from_ms or 0, until_ms)
    show(result.as_json(), as_json, str(result))


@app.command()
def housekeeping(use_case: UseCaseName, as_json: Json = False) -> None:
    """Merge small offline files, apply their retention, remove dead online keys. Safe beside everything else."""
    from features.usecase import load
    from services.housekeeping import housekeeping

    with progress_on_stderr():
        done = housekeeping(Settings.load(), load(use_case))
    show(done.as_json(), as_json, str(done))


@app.command()
def bench(
    what: Annotated[Bench, typer.Argument(help="What to measure.")],
    days: Annotated[int, typer.Option(min=1, max=366, help="Of features and rollout: how much of 2013.")] = 366,
    seconds: Annotated[int, typer.Option(min=5, max=3600, help="Of freshness and learning: how long.")] = 60,
    rate: Annotated[
        int | None, typer.Option(min=10, max=20_000, help="Events (1,000) or labels (50) a second.")
    ] = None,
    kills: Annotated[int, typer.Option(min=0, max=100, help="Of learning: kill -9 of the learner.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure this machine on an embedded stack of its own, beside peers in environments of their own."""
    from benchmarks import features, freshness, learning, rollout, serving, training
    from benchmarks.rig import as_text

    measure = {
        Bench.features: lambda: features.bench(days),
        Bench.freshness: lambda: freshness.bench(seconds, rate or 1000),
        Bench.learning: lambda: learning.bench(seconds, rate or 50, kills),
        Bench.rollout: lambda: rollout.bench(days),
        Bench.serving: serving.bench,
        Bench.training: training.bench,
    }
    if what is Bench.rollout:
        WithoutTorch.end()
    with progress_on_stderr():
        result = measure[what]()
    show(result, as_json, as_text(result))


@app.command()
def doctor() -> None:
    """Check this machine: Java, Maven, compiler, ports, versions; each fault with its mend."""
    from services.setup import doctor

    sys.exit(doctor.run())


class WithoutTorch(MetaPathFinder):
    """Feast imports torch when it can, for images: 2 s and 470 MB a process. Only ranks and learner need it."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "torch":
            raise ModuleNotFoundError("torch is left to the training ranks", name="torch")

    @classmethod
    def end(cls) -> None:
        """From here on this process may import torch."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, cls)]


def main() -> None:
    """Entry point: expected errors become one line and exit code 1; Ctrl-C exits 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime writes it to the home folder otherwise
    sys.meta_path.insert(0, WithoutTorch())
    try:
        app()
    except PenstockError as error:
        sys.exit(f"penstock: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit("penstock: no space is left under `home` or `state_url`: free some; what was not committed is redone")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
