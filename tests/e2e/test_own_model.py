"""A scikit-learn model of the user's own on the real stack: registered, considered, served, swapped by an alias moved
in MLflow; with two controllers of which one acts, and goes on when the other is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from features.clicks import use_case
from pipelines.registry import Registry
from services import rollout, stack, wiring
from services.settings import ROOT, Settings
from services.topic_reader import read_all
from tests.conftest import free_ports
from tests.e2e.test_loop import poll
from tests.services.test_schemas import validate

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]
PENSTOCK = str(Path(sys.executable).parent / "penstock")
ROW = {"entities": {"user": "u1", "section": "sport"}, "fields": {"article": "a1", "position": 3}}


def penstock(*arguments: str) -> str:
    done = subprocess.run([PENSTOCK, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def forest(folder: Path, seed: int) -> Callable[[dict[str, Any]], float]:
    """Boosted trees of scikit-learn, exported into `folder`; what they say of a vector."""
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline

    names, rng = use_case.inputs.numbers, np.random.default_rng(seed)
    x = rng.normal(size=(2000, len(names))).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    boosted = GradientBoostingClassifier(n_estimators=20, random_state=seed)
    trees = make_pipeline(SimpleImputer(strategy="constant", fill_value=0.0), boosted)
    trees.fit(x, np.nan_to_num(x[:, seed]) + rng.normal(size=2000) > 0)
    kind = FloatTensorType([None, len(names)])
    graph = convert_sklearn(trees, initial_types=[("numbers", kind)], options={"zipmap": False}, target_opset=17)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(graph.SerializeToString())

    def score(vector: dict[str, Any]) -> float:
        row = np.array([[vector[name] for name in names]], np.float64).astype(np.float32)
        return float(trees.predict_proba(row)[0, 1])

    return score


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PENSTOCK_PORT_BASE", str(free_ports()))
    with stack.running(Settings.load(), ("clicks",), airflow=False, learner=True) as settings:
        yield settings


def test_a_model_of_the_users_own(settings: Settings, tmp_path: Path) -> None:
    registry = wiring.registry(settings)
    scores = {str(n): forest(tmp_path / str(n), n) for n in (1, 2)}
    for number in scores:
        told = penstock("register", "clicks", str(tmp_path / number), "--learned-until", "2026-01-01", "--json")
        assert json.loads(told) == {"version": number}

    with (
        httpx.Client(base_url=settings.predictor_url, timeout=10) as client,
        contextlib.closing(wiring.broker(settings)) as broker,
    ):

        def answers(version: str) -> bool:
            (row,) = client.post("/predict", json=ROW).json()["rows"]
            return bool(row["version"] == version)

        penstock("rollout", "clicks", "consider", "1")
        poll("answer by version 1", lambda: answers("1"))
        assert "2 stays" not in penstock("rollout", "clicks", "promote", "2")
        poll("answer by version 2", lambda: answers("2"))
        poll("mirrored champion", lambda: registry.aliases("clicks").get("champion") == "2")
        move_alias(registry, "1")
        poll("answer by version 1 again", lambda: answers("1"))
        (by,) = [d["who"] for d in rollout.status(settings, "clicks")["decisions"][-1:]]
        assert by == "MLflow"
        check_logged(broker, scores)
        check_described(broker)
        two_controllers(settings, broker, lambda version: poll(f"answer by {version}", lambda: answers(version)))


def move_alias(registry: Registry, version: str) -> None:
    """What MLflow's page does when somebody moves an alias there."""
    url = f"{registry.url}/api/2.0/mlflow/registered-models/alias"
    httpx.post(url, json={"name": "clicks", "alias": "champion", "version": version}).raise_for_status()


def check_logged(broker: Any, scores: dict[str, Callable[[dict[str, Any]], float]]) -> None:
    """Every logged answer is what scikit-learn itself says of the logged vector."""
    topic = use_case.topic("predictions")

    def read() -> Counter[str]:
        seen: Counter[str] = Counter()
        for record in read_all(broker, topic):
            if record.value and (value := json.loads(record.value))["version"] in scores:
                assert value["score"] == pytest.approx(scores[value["version"]](value["features"]), abs=1e-6)
                seen[value["version"]] += 1
        return seen

    poll("logged answers of both versions", lambda: set(read()) == {"1", "2"})


def check_described(broker: Any) -> None:
    """Every record on every topic is as `penstock schemas` says."""
    described, seen = json.loads(penstock("schemas", "clicks")), set[str]()
    for topic in described["channels"]:
        for record in read_all(broker, topic):
            if record.value is not None:
                seen.add(validate(described, topic, json.loads(record.value)))
    assert {"Predictions", "Commands", "State"} <= seen


def two_controllers(settings: Settings, broker: Any, serves: Callable[[str], Any]) -> None:
    """A second controller waits; commands are decided once; it acts when the first one is killed."""
    group = use_case.topic("control")
    second = subprocess.Popen([PENSTOCK, "run", "control", "clicks"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        poll("second member", lambda: broker.members(group) == 2)
        penstock("rollout", "clicks", "promote", "2")
        os.kill(stack.status(settings)["services"]["control-clicks"]["pid"], signal.SIGKILL)
        penstock("rollout", "clicks", "promote", "1")
        serves("1")
        values = [json.loads(r.value) for r in read_all(broker, use_case.topic("models")) if r.value]
        decisions = rollout.status(settings, "clicks")["decisions"]
        assert len({d["command"] for d in decisions}) == len(decisions) == 5
        generations = [value["generation"] for value in values if "generation" in value]
        assert generations == sorted(set(generations))
    finally:
        second.terminate()
        assert second.wait(30) in (0, 128 + signal.SIGTERM)
