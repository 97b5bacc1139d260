"""`penstock status`: what runs, how far each step has come, what was rejected, what serves."""

from __future__ import annotations

import contextlib
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import msgspec

from features.errors import UnavailableError
from features.usecase import UseCase, load
from pipelines.broker import Broker
from pipelines.checkpoint import watermark_of
from pipelines.learning import REFRESH_KEY
from services import rollout, stack, wiring
from services.settings import Settings
from services.topic_reader import Newest, read_all

STEPS = ("featurizer", "joiner", "learner", "control", "drift")


def status(settings: Settings, use_case_name: str) -> dict[str, Any]:
    """Services of the embedded stack, then the use case's steps and versions as far as Kafka answers."""
    use_case = load(use_case_name)
    result: dict[str, Any] = {**stack.status(settings), "use_case": use_case.name}
    try:
        with contextlib.closing(wiring.broker(settings)) as broker:
            result["steps"] = {step: _step(broker, use_case, step) for step in STEPS}
            result["drift"] = _drift(broker, use_case)
            result["rejected"] = dict(Counter(_reasons(broker, use_case)))
        result["serving"] = rollout.status(settings, use_case.name)
        result["learner"] = _refresh(settings, use_case, result["serving"]["roles"]["champion"])
    except UnavailableError as error:
        result["problem"] = str(error)
    return result


def _reasons(broker: Broker, use_case: UseCase) -> list[str]:
    records = read_all(broker, use_case.topic("rejected"))
    return [msgspec.json.decode(r.value)["reason"] for r in records if r.value]


def _drift(broker: Broker, use_case: UseCase) -> dict[str, Any] | None:
    """The newest record of `<uc>.drift`; None while nothing has moved."""
    told = [msgspec.json.decode(r.value) for r in read_all(broker, use_case.topic("drift")) if r.value]
    return max(told, key=lambda record: record["time"], default=None)


def _refresh(settings: Settings, use_case: UseCase, champion: str | None) -> dict[str, Any] | None:
    """The champion's newest refresh and the learner's ledger of it; None before the first."""
    with contextlib.closing(Newest(wiring.broker(settings), use_case.topic("models"))) as models:
        found = models.read().get(f"{REFRESH_KEY}{champion}".encode())
    return {name: value for name, value in found.items() if name != "score"} if found else None


def _step(broker: Broker, use_case: UseCase, step: str) -> dict[str, Any]:
    """Committed watermark (epoch ms), records not committed yet, live members."""
    group = use_case.topic(step)
    positions = broker.committed(group)
    consumer = broker.consumer(sorted({topic for topic, _ in positions})) if positions else None
    lag = 0
    if consumer:
        ends = consumer.end_offsets(list(positions))
        consumer.close()
        lag = sum(max(0, ends[tp] - p.offset) for tp, p in positions.items())
    mark = watermark_of(broker, group, 1 if step in ("control", "learner") else use_case.partitions)
    return {"watermark": mark, "lag": lag, "members": broker.members(group)}


def as_text(result: dict[str, Any]) -> str:
    """The status for a person."""
    lines = [stack.table(result)]
    if problem := result.get("problem"):
        return "\n".join([*lines, f"  {problem}"])
    for name, step in result["steps"].items():
        mark = step["watermark"]
        at = datetime.fromtimestamp(mark / 1000, UTC).isoformat(timespec="seconds") if mark else "nothing yet"
        lines.append(f"  {name:12} watermark {at}, {step['lag']} records behind, {step['members']} running")
    rejected = ", ".join(f"{n} {reason}" for reason, n in sorted(result["rejected"].items()))
    lines.append(f"  rejected     {rejected or 'none'}")
    if drift := result["drift"]:
        at = datetime.fromtimestamp(drift["time"] / 1000, UTC).isoformat(timespec="seconds")
        lines.append(f"  drift        {drift['what']} up to {at} have {drift['sentence']}")
    return "\n".join([*lines, rollout.as_text(result["serving"]), *_refreshed(result["learner"])])


def _refreshed(refresh: dict[str, Any] | None) -> list[str]:
    if refresh is None:
        return []
    at = datetime.fromtimestamp(refresh["latest_label_time"] / 1000, UTC).isoformat(timespec="seconds")
    told = f"{refresh['learned']:,} examples learned, {refresh['skipped']:,} skipped"
    skipped = [s for s in refresh["spans"] if s["reason"]]
    lines = [f"  refreshed    version {refresh['version']} refresh {refresh['number']}, labels up to {at}; {told}"]
    return lines + [f"    skipped    {s['examples']:,} at {s['offsets']}: {s['reason']}" for s in skipped[-5:]]
