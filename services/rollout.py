"""`penstock rollout`: what serves and why; commands to the controller, and its decisions."""

from __future__ import annotations

import getpass
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from features.errors import InputError, UnavailableError
from features.usecase import UseCase, load
from pipelines.broker import Broker, Consumer, Message
from pipelines.control import STATE_KEY
from pipelines.rollout import RolloutState
from pipelines.trial import Trial
from services import wiring
from services.settings import Settings
from services.topic_reader import Newest

TIMEOUT_S = 60.0


def status(settings: Settings, use_case_name: str) -> dict[str, Any]:
    """The newest serving state; generation 0 without a champion before the first decision."""
    use_case = load(use_case_name)
    models = Newest(wiring.broker(settings), use_case.topic("models"))
    try:
        return dict(models.read().get(STATE_KEY) or RolloutState().as_json())
    finally:
        models.close()


def as_text(state: Mapping[str, Any]) -> str:
    """A state for a person: what serves, the trial, then the decisions, the newest last."""
    champion = state["roles"]["champion"]
    serves = f"version {champion}" if champion else "the declared prior (no version yet)"
    lines = [f"  serving      {serves}, generation {state['generation']}"]
    if trial := trial_sentence(state):
        lines.append(f"  challenger   {trial}")
    return "\n".join([*lines, *(f"  {_at(d['time'])}  {d['sentence']} ({d['who']})" for d in state["decisions"])])


def trial_sentence(state: Mapping[str, Any]) -> str:
    """The trial that runs, and its evidence; empty without one."""
    if not state.get("trial"):
        return ""
    trial = Trial.from_json(state["trial"])
    seen, share = trial.difference, state["shares"].get(trial.version, 0.0)
    facts = f"{trial.phase}, {share:.0%} of callers, log loss {seen.mean:+.4f} a day over {seen.n} days"
    return f"version {trial.version}: {facts}, evidence {math.exp(seen.log_ratio):.1f}"


def _at(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def send(
    settings: Settings,
    use_case_name: str,
    command: str,
    version: str | None = None,
    why: str | None = None,
    timeout: float = TIMEOUT_S,
    who: str = "",
) -> dict[str, Any]:
    """Ask the controller and wait for its decision, whichever it is.

    Raises InputError when the registry has no such version, UnavailableError when no controller decides in time.
    """
    use_case = load(use_case_name)
    record = {
        "command": command,
        "version": version,
        "who": who or os.environ.get("PENSTOCK_WHO") or _who(),
        "why": why or None,
        "id": str(uuid.uuid4()),
        "time": time.time_ns() // 1_000_000,
        "evidence": None,
        "tags": None,
    }
    if version is not None:
        record |= _known(settings, use_case, version, with_evidence=command == "consider")
    return ask(wiring.broker(settings), use_case, record, timeout)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()} (cli)"


def _known(settings: Settings, use_case: UseCase, version: str, *, with_evidence: bool) -> dict[str, Any]:
    """What the registry knows of a version: its tags and, to consider it, its evaluation."""
    registry = wiring.registry(settings)
    versions = {v.version: v for v in registry.versions(use_case.name)}
    if version not in versions:
        known = ", ".join(versions) or "none"
        raise InputError(f"{use_case.name} has no version {version!r} in the registry: there are {known}")
    tags = {name: versions[version].tags.get(name) for name in ("cut", "latest_label_time")}
    if not with_evidence:
        return {"tags": tags}
    folder = registry.download(use_case.name, version, settings.home / "models" / use_case.name)
    return {"tags": tags, "evidence": read_evaluation(folder)}


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """A version's evaluation.json, with null for what is no number; None without one: the controller says so."""
    try:
        evaluation = json.loads((folder / "evaluation.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{folder.name}: evaluation.json can't be read: {error}") from None
    return _plain(evaluation) if isinstance(evaluation, dict) else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ask(broker: Broker, use_case: UseCase, record: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Send a command record, follow `<uc>.models` until its decision is there and return that."""
    follower = broker.consumer([use_case.topic("models")], from_end=True)
    producer = broker.producer()
    try:
        producer.send([Message(use_case.topic("commands"), json.dumps(record).encode(), record["id"].encode())])
        producer.flush()
        return _await(follower, use_case, str(record["id"]), timeout)
    finally:
        producer.close()
        follower.close()


def _await(follower: Consumer, use_case: UseCase, command_id: str, timeout: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for record in follower.poll(0.2):
            if record.key != STATE_KEY or record.value is None:
                continue
            for decision in msgspec.json.decode(record.value)["decisions"]:
                if decision["command"] == command_id:
                    return dict(decision)
    raise UnavailableError(
        f"no decision in {timeout:.0f} s: start the controller with `penstock run control {use_case.name}`;"
        " it will act on this command then"
    )
