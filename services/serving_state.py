"""What serves: the newest state in `<uc>.models`, and the models it names, loaded and swapped in."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from features.errors import InputError, PenstockError, UnavailableError
from features.inputs import Inputs
from features.usecase import ModelInputs, UseCase
from features.vectors import Vectorizer, view_columns
from pipelines.broker import Broker, Consumer, Record
from pipelines.checkpoint import unserved_views
from pipelines.learning import REFRESH_KEY, Refresh
from pipelines.onnx_model import OnnxModel
from services import wiring
from services.settings import Settings

log = structlog.get_logger()
STATE_KEY = b"state"
PRIOR = "prior"
POLL_S = 0.5
UNSERVED_S = 3.0


class Model(Protocol):
    """What scores: a version, or the prior."""

    version: str
    refresh: int
    inputs: ModelInputs

    def score(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Probabilities [n]."""


class Prior:
    """The answer before the first version: the use case's prior for everyone."""

    version, refresh = PRIOR, 0
    inputs = ModelInputs(())

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        return np.full(len(inputs), self.value)


class Serving(NamedTuple):
    """Who scores: the champion answers, but for `share` of the entity keys, which the challenger answers (in shadow 0).

    Immutable, so a batch sees the same models from start to end.
    """

    champion: Model
    challenger: Model | None = None
    share: float = 0.0

    def find(self, version: str) -> Model | None:
        """The loaded model of this version."""
        return next((m for m in (self.champion, self.challenger) if m and m.version == version), None)


@dataclass
class ModelSlot:
    """Where the predictor looks before each batch; a swap of any role is one assignment."""

    serving: Serving


class State(msgspec.Struct):
    """The part of a `<uc>.models` state that serving needs."""

    generation: int
    roles: dict[str, str | None]
    shares: dict[str, float] = {}


@dataclass
class Status:
    """What the follower has done so far.

    generation : newest one applied: its models were swapped in, or refused
    seen : newest one read
    refused : version -> why it does not serve
    held : those of them that wait for the backfill of a view
    problem : why the newest generation is not applied yet
    caught_up : everything that was in the topic at the start has been applied
    """

    generation: int | None = None
    seen: int | None = None
    refused: dict[str, str] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    problem: str = ""
    caught_up: bool = False


class ServingState:
    """The thread that follows `<uc>.models`.

    fetch : version -> folder with its files; UnavailableError (and anything that is no PenstockError) is tried again
    refreshes : where the learner's files are (`state_url`)
    pauses : first and longest pause between tries, seconds
    """

    def __init__(
        self,
        use_case: UseCase,
        broker: Broker,
        slot: ModelSlot,
        fetch: Callable[[str], Path],
        *,
        refreshes: str = "",
        pauses: tuple[float, float] = (0.2, 10.0),
    ) -> None:
        self.status = Status()
        self._use_case, self._broker, self._slot, self._fetch = (use_case, broker, slot, fetch)
        self._vectorizer = Vectorizer(use_case)
        self._pauses, self._pause, self._retry_at = pauses, pauses[0], 0.0
        self.unserved: frozenset[str] = frozenset()
        self._asked, self._again = 0.0, False
        self._newest: State | None = None
        self._refreshes_url = refreshes
        self._refreshes: dict[str, Refresh] = {}
        self._tried: tuple[str, int] = ("", 0)
        self._stop = threading.Event()
        self._caught_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="serving-state", daemon=True)

    def start(self) -> ServingState:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def wait_caught_up(self, timeout: float) -> bool:
        """Wait until the state that was there at the start serves; False when it takes longer."""
        return self._caught_up.wait(timeout)

    def _run(self) -> None:
        pause = self._pauses[0]
        while not self._stop.is_set():
            try:
                self._follow()
            except Exception as error:  # the model at hand goes on serving
                if not self.status.problem:
                    log.warning("serving state can't be read, trying again", error=str(error))
                self.status.problem = f"the serving state can't be read: {error}"
                self._stop.wait(pause)
                pause = min(2 * pause, self._pauses[1])
            else:
                pause = self._pauses[0]

    def _follow(self) -> None:
        consumer = self._broker.consumer([self._use_case.topic("models")])
        try:
            while not self._stop.is_set():
                self._ask_unserved()
                timeout = POLL_S if self._is_applied() else min(POLL_S, max(0.02, self._retry_at - time.monotonic()))
                for record in consumer.poll(timeout):
                    self._read(record)
                if self._at_end(consumer):
                    self._apply()
        finally:
            consumer.close()

    def _ask_unserved(self) -> None:
        """Now and then: which views wait for their backfill and read as missing until then."""
        if time.monotonic() - self._asked < UNSERVED_S:
            return
        found = unserved_views(self._broker, self._use_case.topic("featurizer"))
        if found != self.unserved:
            log.info("views that wait for their backfill", views=sorted(found))
            for version in self.status.held:
                del self.status.refused[version]
            self.status.held = set()
            self._again = True
        self.unserved, self._asked = found, time.monotonic()

    def _at_end(self, consumer: Consumer) -> bool:
        partitions = consumer.assignment()
        return bool(partitions) and all(consumer.at_end(p) for p in partitions)

    def _read(self, record: Record) -> None:
        """Take in a state or a refresh; one that is damaged is skipped."""
        if record.key is None or record.value is None:
            return
        try:
            if record.key == STATE_KEY:
                self._read_state(msgspec.json.decode(record.value, type=State))
            elif record.key.startswith(REFRESH_KEY.encode()):
                refresh = msgspec.json.decode(record.value, type=Refresh)
                self._refreshes[refresh.version] = refresh
        except msgspec.DecodeError as error:
            log.error("a record of what serves can't be read and is skipped", offset=record.offset, error=str(error))

    def _read_state(self, state: State) -> None:
        if self.status.seen is None or state.generation >= self.status.seen:
            self._newest, self.status.seen = state, state.generation
            self._pause, self._retry_at = self._pauses[0], 0.0

    def _is_applied(self) -> bool:
        return self.status.caught_up and self.status.generation == self.status.seen and not self._again

    def _apply(self) -> None:
        """Make the newest state, and its champion's newest refresh, what serves, unless the next try is not due."""
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._newest is not None and not self._is_applied():
                self._serve(self._newest)
                self.status.generation, self._again = self._newest.generation, False
            self._refresh()
        except UnavailableError as error:
            self._try_later(error)
            return
        self.status.problem = ""
        self.status.caught_up = True
        self._caught_up.set()

    def _serve(self, state: State) -> None:
        """Swap in the champion (None: the prior) at once, then the challenger; one that is refused changes nothing."""
        before, wanted = self._slot.serving, state.roles.get("challenger")
        champion = self._model(state.roles.get("champion")) or before.champion
        challenger = before.find(wanted) if wanted and wanted != champion.version else None
        share = state.shares.get(wanted or "", 0.0)
        self._slot.serving = Serving(champion, challenger, share)
        if wanted is not None and wanted != champion.version and challenger is None:
            self._slot.serving = Serving(champion, self._model(wanted, challenges=True), share)
        if (now := _versions(self._slot.serving)) != _versions(before):
            log.info("serves", **now)

    def _model(self, version: str | None, *, challenges: bool = False) -> Model | None:
        """The model of a version, at hand or loaded; None when it is refused."""
        if version is None:
            return Prior(self._use_case.prior)
        if version in self.status.refused:
            return None
        try:
            model = self._slot.serving.find(version) or self._load(version)
            if challenges and (views := self._waiting_views(model.inputs)):
                self.status.held.add(version)
                raise InputError(f"version {version} reads views that wait for their backfill: {', '.join(views)}")
        except UnavailableError:
            raise
        except PenstockError as error:
            log.error("version refused, what serves goes on", version=version, error=str(error))
            self.status.refused[version] = str(error)
            return None
        return model

    def _waiting_views(self, inputs: ModelInputs) -> list[str]:
        views = (view for view in self._use_case.views if view.name in self.unserved)
        return [v.name for v in views if {c.name for c in view_columns(v)} & set(inputs.columns)]

    def _load(self, version: str) -> OnnxModel:
        try:
            folder = self._fetch(version)
        except PenstockError:
            raise
        except Exception as error:  # a registry's client has errors of many kinds; none says that a version is bad
            raise UnavailableError(f"version {version} can't be fetched: {error}") from error
        model = OnnxModel.load(folder, version)
        self._vectorizer.check(model.inputs)
        return model

    def _refresh(self) -> None:
        """Swap in the champion's newest refresh; one that is refused leaves the weights at hand."""
        model = self._slot.serving.champion
        newest = self._refreshes.get(model.version)
        if newest is None or not isinstance(model, OnnxModel) or newest.number <= model.refresh or not newest.file:
            return
        if self._tried == (model.version, newest.number):
            return
        try:
            refreshed = model.refreshed(self._refresh_file(newest), newest.score, newest.number)
            self._slot.serving = self._slot.serving._replace(champion=refreshed)
        except InputError as error:
            log.error("refresh refused, the weights before it go on", error=str(error))
            self.status.refused[f"{model.version} refresh"] = str(error)
            self._tried = (model.version, newest.number)

    def _refresh_file(self, refresh: Refresh) -> bytes:
        """The refresh's graph; InputError when it is not what its record says."""
        name = f"refresh {refresh.number} of version {refresh.version}"
        try:
            with fsspec.open(f"{self._refreshes_url}/{refresh.file}", "rb") as file:
                graph = bytes(file.read())
        except FileNotFoundError:
            raise InputError(f"{name} is gone: {refresh.file}") from None
        except OSError as error:
            raise UnavailableError(f"{name} can't be read: {error}") from error
        if hashlib.sha256(graph).hexdigest() != refresh.sha256:
            raise InputError(f"{name} is refused: {refresh.file} has another SHA-256 than its record says")
        return graph

    def _try_later(self, error: PenstockError) -> None:
        if not self.status.problem:
            log.warning("version can't be fetched, trying again", error=str(error))
        self.status.problem = str(error)
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, self._pauses[1])

    def report(self) -> dict[str, Any]:
        """For `/readyz`."""
        status = self.status
        report: dict[str, Any] = {
            "ready": status.caught_up,
            "generation": status.generation,
            **_versions(self._slot.serving),
            "refused": dict(status.refused),
        }
        waiting = "" if status.caught_up else f"{self._use_case.topic('models')} is not read to its end yet"
        problem = status.problem or waiting
        return report | ({"problem": problem} if problem else {})


def follow(settings: Settings, use_case: UseCase, broker: Broker, slot: ModelSlot) -> ServingState:
    """The state of a use case, followed: versions from the registry, refreshes from the learner's files."""
    registry, models = wiring.registry(settings), settings.home / "models" / use_case.name

    def fetch(version: str) -> Path:
        return registry.download(use_case.name, version, models)

    return ServingState(use_case, broker, slot, fetch, refreshes=settings.state_url).start()


def _versions(serving: Serving) -> dict[str, Any]:
    champion, challenger, share = serving
    found = {"champion": champion.version, "refresh": champion.refresh}
    return found | ({"challenger": challenger.version, "share": share} if challenger else {})
