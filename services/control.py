"""What the controller decided, mirrored into MLflow for people to see. `<uc>.models` stays the truth.

The other way round, an alias `champion` that somebody moved there is a command to promote that version.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import structlog

from features.errors import InputError
from pipelines.broker import Message
from pipelines.control import STATE_KEY
from services import rollout, wiring
from services.settings import Settings
from services.topic_reader import Newest

ALIASES = ("champion", "challenger")
LOOK_S = 5.0  # between looks at the aliases
PAUSES_S = (0.5, 30.0)
log = structlog.get_logger()
Fact = tuple[str, str, str]  # version, key, value


class Registry(Protocol):
    """What the mirror needs of the model registry."""

    def set_alias(self, name: str, alias: str, version: str) -> None: ...

    def drop_alias(self, name: str, alias: str) -> None: ...

    def aliases(self, name: str) -> dict[str, str]: ...

    def tag(self, name: str, version: str, key: str, value: str) -> None: ...


def facts(state: Mapping[str, Any]) -> Iterator[Fact]:
    """What a state says of its versions, as tags; the newest decision on a version counts."""
    newest = {d["version"]: d for d in state["decisions"] if d["version"] is not None}
    for version, decision in newest.items():
        yield version, "decision", decision["sentence"]
        yield version, "role", _role(state, version, decision["action"])


def _role(state: Mapping[str, Any], version: str, action: str) -> str:
    if version == state["roles"]["champion"]:
        return "champion"
    if version == state["roles"].get("challenger"):
        return str(state["phase"])
    served = state["versions"].get(version)
    if served is None:
        return action
    return "rolled_back" if "rolled_back" in served else "retired"


def mirror(registry: Registry, name: str, state: Mapping[str, Any], done: set[Fact] | None = None) -> None:
    """Set aliases and tags as the state has them, and again changes nothing.

    `done` is what has been set already; it is not set again. A version that the registry doesn't know is skipped.
    """
    done = set() if done is None else done
    wanted = [*facts(state), *((state["roles"].get(alias) or "", alias, "") for alias in ALIASES)]
    for fact in wanted:
        version, key, value = fact
        if fact in done:
            continue
        try:
            if key not in ALIASES:
                registry.tag(name, version, key, value)
            elif version:
                registry.set_alias(name, key, version)
            elif any(old[1] == key for old in done):
                registry.drop_alias(name, key)
        except InputError as error:
            log.warning("not mirrored", model=name, version=version, error=str(error))
        done -= {old for old in done if old[1] == key and (key in ALIASES or old[0] == version)}
        done.add(fact)


class Mirror:
    """Mirrors each newest state on a thread of its own, until MLflow has it: control never waits for MLflow.

    Called with the messages of a commit. At its start it mirrors the state that is there. Between states it looks
    whether somebody moved the alias of the champion, and asks for that version's promotion.
    """

    def __init__(self, settings: Settings, use_case_name: str, registry: Registry | None = None) -> None:
        self._settings, self._name, self._topic = settings, use_case_name, f"{use_case_name}.models"
        self._registry: Registry = registry or wiring.registry(settings)
        self._state: Mapping[str, Any] | None = None
        self._changed, self._stop = threading.Event(), threading.Event()
        self._done: set[Fact] = set()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def __call__(self, outputs: Sequence[Message]) -> None:
        for message in outputs:
            if message.topic == self._topic and message.key == STATE_KEY and message.value is not None:
                self._state = json.loads(message.value)
                self._changed.set()

    def close(self) -> None:
        """Stop; what is not mirrored yet is at the next start."""
        self._stop.set()
        self._changed.set()
        self._thread.join(30)

    def _run(self) -> None:
        pause, read = PAUSES_S[0], False
        while not self._stop.is_set():
            try:
                if not read:
                    found = self._read()
                    self._state, read = self._state or found, True
                self._mirror()
            except Exception as error:  # whatever MLflow or its client does, control goes on and this tries again
                log.warning("not mirrored to MLflow, trying again", use_case=self._name, error=str(error))
                self._stop.wait(pause)
                pause = min(2 * pause, PAUSES_S[1])
            else:
                pause = PAUSES_S[0]
                if not self._changed.wait(LOOK_S):
                    self._look()

    def _look(self) -> None:
        """Whether the alias still is where the mirror put it; if not, that is a command."""
        champion = self._state["roles"]["champion"] if self._state else None
        if champion is None:
            return
        moved = self._registry.aliases(self._name).get(ALIASES[0])
        if moved in (None, champion) or self._changed.is_set():
            return
        newest = self._read()
        if newest != self._state:  # another controller has acted
            self._state = newest
            self._changed.set()
            return
        rollout.send(self._settings, self._name, "promote", moved, "its alias was moved in MLflow", who="MLflow")

    def _read(self) -> Mapping[str, Any] | None:
        with contextlib.closing(Newest(wiring.broker(self._settings), self._topic)) as models:
            return models.read().get(STATE_KEY)

    def _mirror(self) -> None:
        self._changed.clear()
        if self._state is not None:
            mirror(self._registry, self._name, self._state, self._done)
