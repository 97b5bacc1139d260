"""The `penstock` command. Each command parses its arguments and calls one function, imported when it runs."""

from __future__ import annotations

import json
import signal
import sys
from datetime import UTC, datetime, timedelta
from enum import StrEnum
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


Day = Annotated[datetime, typer.Option(parser=parse_day, metavar="DATE", help="UTC; the range is half-open.")]


class Requests(StrEnum):
    http = "http"
    topic = "topic"


def show(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a command's result: one JSON object, or its text."""
    print(json.dumps(result) if as_json else text)


def main() -> None:
    """Entry point: expected errors become one line and exit code 1; Ctrl-C exits 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except PenstockError as error:
        sys.exit(f"penstock: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
