"""`penstock status`: what runs, how far each step has come, what was rejected, what serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from features.errors import PenstockError, UnavailableError
from features.usecase import load
from pipelines.broker import Consumer, Record
from pipelines.checkpoint import parse_metadata
from pipelines.control import STATE_KEY
from pipelines.learning import REFRESH_KEY
from pipelines.rollout import RolloutState
from services import embedded, rollout, stack, wiring
from services.predict_client import PredictClient
from services.settings import Settings
from services.topic_reader import Fold, Newest

STEPS = ("featurizer", "joiner", "learner", "control", "drift")
READY_S = 2.0


def status(settings: Settings, use_case_name: str) -> dict[str, Any]:
    """The status now."""
    with contextlib.closing(StatusReader(settings, use_case_name)) as reader:
        return reader.read()


class StatusReader:
    """Reads the status again and again: services of the embedded stack, what answers, and as far as Kafka does the use
    case's steps and versions. What was read of a topic isn't read again, by another reader of this home neither.
    """

    def __init__(self, settings: Settings, use_case_name: str) -> None:
        self.settings, self.use_case = settings, load(use_case_name)
        self.broker = wiring.broker(settings)
        self._ends: Consumer | None = None
        self._topics: set[str] = set()
        self._parts: list[Fold | Newest] = []

    def read(self) -> dict[str, Any]:
        """The status now; raises nothing that an outage brings."""
        settings = self.settings
        result: dict[str, Any] = {**stack.status(settings), "use_case": self.use_case.name}
        result["predictor"] = _ready(settings)
        result["reachable"] = reachable(settings, result)
        try:
            result |= self._steps()
        except UnavailableError as error:
            result["problem"] = str(error)
            self._disconnect()
        result["reachable"]["kafka"] = "problem" not in result
        return result

    def _steps(self) -> dict[str, Any]:
        if not self._parts:
            self._parts = [self.fold("rejected", _count_reason), self.fold("drift", _newest_drift)]
            self._parts.append(Newest(self.broker, self.use_case.topic("models")))
        rejected, drift, models = self._parts
        assert isinstance(rejected, Fold) and isinstance(drift, Fold) and isinstance(models, Newest)
        steps = {step: self._step(step) for step in STEPS}
        rejected.read()
        drift.read()
        values = models.read()
        serving = dict(values.get(STATE_KEY) or RolloutState().as_json())
        refresh = values.get(f"{REFRESH_KEY}{serving['roles']['champion']}".encode())
        return {
            "steps": steps,
            "drift": drift.state.get("newest"),
            "rejected": dict(rejected.state),
            "serving": serving,
            "learner": {name: value for name, value in refresh.items() if name != "score"} if refresh else None,
        }

    def fold(self, topic: str, fold: Callable[[dict[str, Any], Record], None]) -> Fold:
        """A fold over one of the use case's topics; its file is in this home."""
        name = self.use_case.topic(topic)
        return Fold(self.broker, name, self.settings.home / "status" / f"{name}.json", fold)

    def _step(self, step: str) -> dict[str, Any]:
        """Committed watermark (epoch ms), position and lag (records), live members."""
        group = self.use_case.topic(step)
        positions = self.broker.committed(group)
        ends = self._end_offsets({topic for topic, _ in positions}).end_offsets(list(positions)) if positions else {}
        marks = {tp[1]: parse_metadata(p.metadata).watermark for tp, p in positions.items()}
        expected = 1 if step in ("control", "learner") else self.use_case.partitions
        return {
            "watermark": min(marks.values()) if len(marks) >= expected else None,
            "position": sum(p.offset for p in positions.values()),
            "lag": sum(max(0, ends[tp] - p.offset) for tp, p in positions.items()),
            "members": self.broker.members(group),
        }

    def _end_offsets(self, topics: set[str]) -> Consumer:
        """One consumer of all topics that steps read, to ask for their ends."""
        if self._ends is None or not topics <= self._topics:
            if self._ends:
                self._ends.close()
            self._topics |= topics
            self._ends = self.broker.consumer(sorted(self._topics))
        return self._ends

    def close(self) -> None:
        """Save what was read, and disconnect."""
        self._disconnect()
        self.broker.close()

    def _disconnect(self) -> None:
        parts, self._parts = [*self._parts, *([self._ends] if self._ends else [])], []
        self._ends = None
        for part in parts:
            part.close()


def _count_reason(counts: dict[str, Any], record: Record) -> None:
    if record.value:
        reason = msgspec.json.decode(record.value)["reason"]
        counts[reason] = counts.get(reason, 0) + 1


def _newest_drift(state: dict[str, Any], record: Record) -> None:
    """The newest record of `<uc>.drift`; none while nothing has moved."""
    told = msgspec.json.decode(record.value) if record.value else {"time": 0}
    if told["time"] > (state.get("newest") or {"time": 0})["time"]:
        state["newest"] = told


def _ready(settings: Settings) -> dict[str, Any] | None:
    """What the predictor's /readyz says; None when it doesn't answer."""
    with contextlib.closing(PredictClient(settings.predictor_url, timeout_s=READY_S)) as client:
        reply = client.get("/readyz")
    return reply if reply and "ready" in reply else None


def reachable(settings: Settings, status: Mapping[str, Any]) -> dict[str, bool]:
    """Whether what the steps lean on answers; of an embedded stack, what it was started with."""
    probes: dict[str, Callable[[], bool]] = {
        "redis": lambda: _redis_answers(settings.redis),
        "mlflow": lambda: embedded.answers(f"{settings.mlflow_url}/health"),
        "airflow-api": lambda: embedded.answers(f"{settings.airflow_url}/api/v2/monitor/health"),
    }
    started = status["services"] if status["running"] else probes
    return {"predictor": bool(status["predictor"])} | {
        part: _answers(probe) for part, probe in probes.items() if part in started
    }


def _redis_answers(connection: str) -> bool:
    """`host:port,password=...`, as Feast has it; a file always answers."""
    if connection.startswith("sqlite:"):
        return True
    address, *options = connection.split(",")
    host, port = address.rsplit(":", 1)
    password = next((o.removeprefix("password=") for o in options if o.startswith("password=")), "")
    return embedded.redis_answers(int(port), password, host)


def _answers(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except (OSError, PenstockError):
        return False


def as_text(result: dict[str, Any]) -> str:
    """The status for a person."""
    lines = [stack.table(result)]
    if away := [part for part, there in result["reachable"].items() if not there]:
        lines.append(f"  no answer    {', '.join(away)}")
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
