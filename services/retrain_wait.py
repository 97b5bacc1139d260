"""Makes a replay reproducible: at each cut it waits until the version trained up to it has been decided on."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from features.usecase import UseCase
from pipelines.broker import Broker
from services.cuts import Cuts
from services.predict_client import PredictClient
from services.progress import iso
from services.replay_log import ReplayLog, log_path, read_log
from services.replay_session import wait_until
from services.settings import Settings
from services.topic_reader import Newest

DEADLINE_S = 600.0
POLL_S = 0.05


class RetrainWait:
    """Called at every tick; at a cut it returns when the cut's version is registered, decided on and, if it is the
    champion now, served. No version yet and too few examples for one: nothing to wait for.

    from_ms : the replay's start; there is nothing to train on at it
    """

    def __init__(self, settings: Settings, use_case: UseCase, broker: Broker, from_ms: int) -> None:
        self.settings, self.use_case, self.from_ms = settings, use_case, from_ms
        self.every_ms = use_case.retrain_every // timedelta(milliseconds=1)
        self.cuts, self.models = Cuts(broker, use_case), Newest(broker, use_case.topic("models"))
        self.client = PredictClient(settings.predictor_url)
        path = log_path(settings, use_case.name)
        self.known = {e["cut"] for e in read_log(path) if e["kind"] == "retrain"}
        self.log = ReplayLog(path)

    def __call__(self, tick: int, marked: float) -> None:
        """`marked`: wall clock when the clock record of `tick` was out."""
        if tick % self.every_ms or tick <= self.from_ms:
            return
        wait_until(lambda: self.cuts.newest()[0] >= tick, lambda: self._no_cut(tick), DEADLINE_S, POLL_S)
        if not self._state().get("versions") and self.cuts.newest()[1] < self.use_case.min_examples:
            return
        wait_until(lambda: bool(self._decision(tick)), lambda: self._lacking(tick), DEADLINE_S, POLL_S)
        wait_until(self._serves, self._not_served, DEADLINE_S, POLL_S)
        served = time.time()
        if tick not in self.known:
            self._record(tick, served - marked)

    def close(self) -> None:
        """Give the connections back."""
        for part in (self.cuts, self.models, self.client, self.log):
            part.close()

    def _state(self) -> dict[str, Any]:
        return self.models.read().get(b"state") or {}

    def _decision(self, cut: int) -> dict[str, Any]:
        """What control decided first on the newest version of this cut; empty before. Partitions that announce a cut
        apart wake several runs, which may ask again."""
        made = [d for d in self._state().get("decisions", []) if d.get("cut") == cut]
        return next((d for d in made if d["version"] == made[-1]["version"]), {})

    def _serves(self) -> bool:
        state, ready = self._state(), self.client.get("/readyz") or {}
        champion = state.get("roles", {}).get("champion")
        current = int(ready.get("generation") or 0) >= int(state.get("generation", 0))
        return bool(ready.get("ready")) and current and (champion is None or ready.get("champion") == champion)

    def _record(self, cut: int, seconds: float) -> None:
        from pipelines.registry import Registry

        decision = self._decision(cut)
        versions = Registry(self.settings.mlflow_url).versions(self.use_case.name)
        metrics = next((dict(v.metrics) for v in versions if v.version == decision["version"]), {})
        what = {name: decision.get(name) for name in ("version", "action", "sentence")}
        training = metrics.get("training_s")
        self.log.add("retrain", cut=cut, label_to_serving_s=round(seconds, 2), training_s=training, **what)
        self.known.add(cut)

    def _no_cut(self, cut: int) -> str:
        return f"the joiner has not announced the cut {iso(cut)} on {self.use_case.topic('cuts')}: {self._where()}"

    def _lacking(self, cut: int) -> str:
        return f"no decision on a version with cut {iso(cut)}: {self._where()}"

    def _not_served(self) -> str:
        said = self.client.get("/readyz")
        return f"the predictor does not serve the newest state, its /readyz says {said}: {self._where()}"

    def _where(self) -> str:
        dag = f"{self.use_case.name}_retrain"
        return f"see DAG {dag} at {self.settings.airflow_url} and the logs in {self.settings.home}/logs"
