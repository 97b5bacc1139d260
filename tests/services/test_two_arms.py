"""Champion and challenger: both score every row, and each key is always answered by the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipelines.onnx_model import OnnxModel, _session
from pipelines.prediction import in_share
from pipelines.scorer import Scorer
from services.arms import Arms
from services.serving_state import ModelSlot, Serving
from tests.due import due
from tests.models import save_model
from tests.predict_rig import ROW, Service
from tests.toy import use_case

HOUR = 3_600_000


def version(tmp_path: Path, name: str, **kind: Any) -> OnnxModel:
    return OnnxModel.load(save_model(tmp_path / name, **kind), name)


def make_nan(model: OnnxModel, tmp_path: Path) -> None:
    graph = (save_model(tmp_path / "nan", nan=True) / "model.onnx").read_bytes()
    model._session = _session(graph, model.inputs)


def rows(n: int) -> list[dict[str, Any]]:
    return [{**ROW, "request_id": str(i), "entities": {"shop": f"s{i}", "item": i}} for i in range(n)]


def answers(service: Service, n: int = 200) -> list[dict[str, Any]]:
    return list(service.predict({"rows": rows(n)}).json()["rows"])


def test_in_shadow_the_champion_answers_and_both_scores_are_logged(service: Service, tmp_path: Path) -> None:
    service.slot.serving = Serving(version(tmp_path, "3", bias=1.0), version(tmp_path, "4", bias=-1.0))
    assert {(a["version"], a["arm"]) for a in answers(service)} == {("3", "champion")}
    for _, record in service.records():
        assert record["shadow"] == {"4": pytest.approx(1 - record["score"], abs=1e-6)}
        assert record["score_ms"].keys() == {"3", "4"} and min(record["score_ms"].values()) > 0


def test_a_canarys_share_of_the_keys_is_answered_by_it_and_stays_so(service: Service, tmp_path: Path) -> None:
    champion, challenger = version(tmp_path, "3", bias=1.0), version(tmp_path, "4", bias=-1.0)
    service.slot.serving = Serving(champion, challenger, 0.3)
    first, again = answers(service), answers(service)
    assert [a["arm"] for a in first] == [a["arm"] for a in again]
    arms = {(a["arm"], a["version"], round(a["score"], 3)) for a in first}
    assert arms == {("champion", "3", 0.731), ("canary", "4", 0.269)}
    assert 30 <= sum(a["arm"] == "canary" for a in first) <= 90
    for _, record in service.records():
        other = "3" if record["arm"] == "canary" else "4"
        assert (record["version"] != other, list(record["shadow"])) == (True, [other])


def test_the_next_canary_takes_other_keys_in_its_share() -> None:
    keys = [(f"s{i}", i) for i in range(4000)]
    first, second = ([in_share(k, v, 0.25) for k in keys] for v in ("4", "5"))
    assert 900 < sum(first) < 1100 and 900 < sum(second) < 1100
    assert 180 < sum(a and b for a, b in zip(first, second, strict=True)) < 320  # 250 by chance
    assert not any(in_share(k, "4", 0.0) for k in keys) and all(in_share(k, "4", 1.0) for k in keys)


@pytest.mark.parametrize("fails", [False, True])
def test_a_challenger_without_a_score_leaves_its_callers_to_the_champion(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    champion, challenger = version(tmp_path, "3", bias=1.0), version(tmp_path, "4")
    challenger._session = _session(
        (save_model(tmp_path / "nan", nan=True) / "model.onnx").read_bytes(), champion.inputs
    )
    if fails:
        monkeypatch.setattr(challenger, "score", lambda inputs: 1 / 0)
    service.slot.serving = Serving(champion, challenger, 1.0)
    assert {(a["version"], a["arm"]) for a in answers(service, 5)} == {("3", "champion")}
    assert [record["shadow"] for _, record in service.records()] == [{"4": None}] * 5
    assert service.records()[0][1]["score_ms"].keys() == ({"3"} if fails else {"3", "4"})
    assert service.metric('shadow_failures_total{version="4"}') == 5
    assert service.metric("nan_scores_total") == 0


def test_a_champion_without_a_score_is_answered_by_the_prior_and_shadowed_as_null(
    service: Service, tmp_path: Path
) -> None:
    champion, challenger = version(tmp_path, "3"), version(tmp_path, "4", bias=-1.0)
    make_nan(champion, tmp_path)
    service.slot.serving = Serving(champion, challenger, 0.5)
    by_arm = {a["arm"]: round(a["score"], 3) for a in answers(service, 50)}
    assert by_arm == {"champion": 0.3, "canary": 0.269}
    shadows = {record["arm"]: record["shadow"] for _, record in service.records()}
    assert shadows["canary"] == {"3": None}


def test_models_that_read_different_features_are_scored_from_one_vector(service: Service, tmp_path: Path) -> None:
    from features.usecase import ModelInputs

    narrow = version(tmp_path, "4", bias=-1.0, inputs=ModelInputs(("price",)))
    service.slot.serving = Serving(version(tmp_path, "3", bias=1.0), narrow)
    answers(service, 1)
    assert service.records()[0][1]["shadow"]["4"] == pytest.approx(0.2809, abs=1e-4)  # sigmoid(-1 + .01 x 6.0)
    assert service.store.reads == 1


def test_requests_on_the_topic_are_answered_by_the_same_arms(service: Service, tmp_path: Path) -> None:
    serving = Serving(version(tmp_path, "3", bias=1.0), version(tmp_path, "4", bias=-1.0), 0.3)
    service.slot.serving = serving
    scorer = Scorer(use_case, lambda entities, fields: (entities, fields), Arms(use_case, ModelSlot(serving)).answers)
    contracts, topic = list(scorer.inputs.values()), use_case.topic("requests")
    asked = [row | {"event_time": HOUR + i} for i, row in enumerate(rows(200))]
    values = [scorer.inputs[topic].decode(msgspec.json.encode(row)) for row in asked]
    places = [(HOUR + i, list(scorer.inputs).index(topic), 0, i, HOUR + i) for i in range(200)]
    streamed = scorer.process(due(contracts, places, values), 2 * HOUR).messages
    found = {r["request_id"]: r for r in (msgspec.json.decode(m.value or b"") for m in streamed)}
    told = answers(service)
    assert {a["arm"] for a in told} == {"champion", "canary"}
    for answer in told:
        record = found[answer["request_id"]]
        assert (record["arm"], record["version"]) == (answer["arm"], answer["version"])
        assert record["score"] == pytest.approx(answer["score"], abs=1e-6)
        assert record["shadow"].keys() == {"3", "4"} - {answer["version"]} and len(record["score_ms"]) == 2
