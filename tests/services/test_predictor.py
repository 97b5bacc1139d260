"""The real application over HTTP in process: answers, records, refusals, and what happens when things are away."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from features.errors import UnavailableError
from features.vectors import Vectorizer, empty_row
from pipelines.memory_store import MemoryStore
from pipelines.onnx_model import OnnxModel, _session
from pipelines.step import Rows
from services.predict_app import create_app
from services.serving_state import ModelSlot, Prior, Serving
from services.settings import Settings
from services.spool import Spool
from tests.models import save_model
from tests.predict_rig import NOW, ROW, Make, Service, Store
from tests.toy import shop_item, use_case


def stored(service: Service, time: int = NOW - 5) -> None:
    row = {**empty_row(shop_item), "si_count": 4}
    service.store.rows.write(
        [
            Rows("all_orders", [], [NOW - 9], {"all_count": [2], "all_mean": [3.0]}),
            Rows("shop_item", [["a"], [1]], [time], {name: [value] for name, value in row.items()}),
        ]
    )


def test_a_view_that_waits_for_its_backfill_reads_as_missing(service: Service) -> None:
    stored(service)
    waiting = frozenset({"shop_item"})
    app = create_app(
        use_case, service.store, service.spool, service.slot, Settings(), clock=lambda: NOW, unserved=lambda: waiting
    )
    reply = Service(service.store, service.spool, service.slot, app).predict(ROW)
    assert reply.json()["rows"][0]["missing"] == ["shop_item"]


def test_the_prior_answers_before_the_first_version(service: Service) -> None:
    stored(service)
    reply = service.predict({"rows": [ROW]})
    answer = {"request_id": "r1", "score": 0.3, "version": "prior", "arm": "champion", "refresh": 0}
    answer |= {"missing": [], "stale": []}
    assert (reply.status_code, reply.json()) == (200, {"rows": [answer]})
    assert reply.headers["content-type"] == "application/json"


def test_a_model_answers_from_stored_and_on_demand_features(service: Service, tmp_path: Path) -> None:
    stored(service)
    service.slot.serving = Serving(OnnxModel.load(save_model(tmp_path / "5", bias=1.0), "5"))
    answer = service.predict(ROW).json()["rows"][0]
    assert answer["version"] == "5"
    assert answer["score"] == pytest.approx(1 / (1 + math.exp(-1.02)), abs=1e-6)
    assert service.records()[0][1]["features"]["price_ratio"] == 2.0


def test_the_record_holds_what_was_served(service: Service) -> None:
    stored(service)
    service.predict(ROW)
    ((key, partition, timestamp, headers), value) = service.records()[0]
    assert (key, partition, timestamp, headers) == ("r1", 0, NOW, [["sent", str(NOW)]])
    features = value.pop("features")
    assert list(features) == list(Vectorizer(use_case).types)
    assert (features["si_count"], features["si_last_3"], features["due"]) == (4, [], None)
    assert value == {
        "request_id": "r1",
        "event_time": NOW,
        "entities": {"shop": "a", "item": 1},
        "fields": {"price": 6.0, "due": None},
        "schema": Vectorizer(use_case).schema_id,
        "feature_times": {"all_orders": NOW - 9, "shop_item": NOW - 5},
        "version": "prior",
        "refresh": 0,
        "arm": "champion",
        "score": 0.3,
        "shadow": {},
        "score_ms": {"prior": pytest.approx(0, abs=1000)},
    }


def test_missing_and_stale_views_are_named_and_counted(service: Service) -> None:
    stored(service, time=NOW - 3 * 3_600_000)
    stale = service.predict(ROW).json()["rows"][0]
    assert (stale["missing"], stale["stale"]) == (["shop_item"], ["shop_item"])
    other = service.predict({**ROW, "entities": {"shop": "b", "item": 1}}).json()["rows"][0]
    assert (other["missing"], other["stale"]) == (["shop_item"], [])
    assert (service.metric("missing_rows_total"), service.metric("stale_rows_total")) == (2, 1)
    assert (service.metric("rows_total"), service.metric('requests_total{status="200"}')) == (2, 2)


def test_rows_without_an_id_get_one_each(service: Service) -> None:
    row = {k: v for k, v in ROW.items() if k != "request_id"}
    ids = [r["request_id"] for r in service.predict({"rows": [row, row]}).json()["rows"]]
    assert len(set(ids)) == 2
    assert all(ids)
    assert [value["request_id"] for _, value in service.records()] == ids


def test_event_time_drives_everything_where_it_is_allowed(make: Make) -> None:
    service = make(allow_event_time=True)
    for at in ("2013-01-15T07:00:00-05:00", 1_358_251_200_000):
        assert service.predict({**ROW, "event_time": at}).status_code == 200
    for (_, _, timestamp, headers), value in service.records():
        assert (timestamp, value["event_time"], value["features"]["hour"]) == (1_358_251_200_000, 1_358_251_200_000, 12)
        assert headers == [["sent", str(NOW)]]


def test_many_requests_at_once_are_answered_each_with_its_own(service: Service) -> None:
    stored(service)
    bodies = [{"rows": [{**ROW, "request_id": f"{i}-{j}"} for j in range(i % 3 + 1)]} for i in range(60)]
    replies = service.send(*(("POST", "/predict", {"json": body}) for body in bodies))
    for body, reply in zip(bodies, replies, strict=True):
        assert [r["request_id"] for r in reply.json()["rows"]] == [r["request_id"] for r in body["rows"]]
    assert service.store.reads < 60
    assert len(service.records()) == sum(len(body["rows"]) for body in bodies)


def test_a_thousand_rows_are_answered(service: Service) -> None:
    reply = service.predict({"rows": [ROW] * 1000})
    assert (reply.status_code, len(reply.json()["rows"])) == (200, 1000)


def without(name: str) -> dict[str, Any]:
    return {**ROW, "entities": {k: v for k, v in ROW["entities"].items() if k != name}}  # type: ignore[attr-defined]


REFUSALS = {
    "not json": (b"{", 400, None, None, "not valid JSON"),
    "nothing": (b"", 400, None, None, "not valid JSON"),
    "not utf-8": (b'{"request_id": "\xff"}', 400, None, None, ""),
    "nan": (b'{"entities": {"shop": "a", "item": 1}, "fields": {"price": NaN}}', 400, None, None, "not valid JSON"),
    "deep": (b'{"rows":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None, None, ""),
    "deep unknown": (b'{"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, 400, None, None, ""),
    "an array": ([ROW], 422, None, None, "Expected `object`"),
    "null": (b"null", 422, None, None, "Expected `object`"),
    "rows no list": ({"rows": 3}, 422, None, None, "Expected `array`"),
    "row no object": ({"rows": [ROW, 3]}, 422, 1, None, "Expected `object`"),
    "no rows": ({"rows": []}, 422, None, "rows", "empty"),
    "too many rows": ({"rows": [ROW] * 1001}, 413, None, None, "1,000"),
    "too big": (b" " * (1 << 20) + b"{}", 413, None, None, "1048576 bytes"),
    "no entities": ({"fields": {"price": 1.0}}, 422, None, "entities", "missing required field `entities`"),
    "no fields": ({"entities": ROW["entities"]}, 422, None, "fields", "missing required field `fields`"),
    "entity missing": ({"rows": [ROW, without("item")]}, 422, 1, "item", "missing required field `item`"),
    "entity of a wrong type": ({**ROW, "entities": {"shop": 7, "item": 1}}, 422, None, "shop", "Expected `str`"),
    "entity null": ({"rows": [{**ROW, "entities": {"shop": None, "item": 1}}]}, 422, 0, "shop", "got `null`"),
    "entity over 64 bits": ({**ROW, "entities": {"shop": "a", "item": 1 << 63}}, 422, 0, "item", "64 bits"),
    "field missing": ({"rows": [{**ROW, "fields": {}}]}, 422, 0, "price", "missing required field `price`"),
    "field of a wrong type": ({"rows": [{**ROW, "fields": {"price": "1"}}]}, 422, 0, "price", "Expected `float`"),
    "infinite": (b'{"entities": {"shop": "a", "item": 1}, "fields": {"price": 1e999}}', 422, None, "price", "range"),
    "time without offset": ({**ROW, "fields": {"price": 1.0, "due": "2013-01-01T00:00:00"}}, 422, None, "due", ""),
    "time out of range": ({**ROW, "fields": {"price": 1.0, "due": -1}}, 422, 0, "due", "between 1970"),
    "id of a wrong type": ({**ROW, "request_id": 7}, 422, None, "request_id", "Expected `str | null`"),
    "id empty": ({**ROW, "request_id": ""}, 422, 0, "request_id", "empty"),
    "id too long": ({**ROW, "request_id": "x" * 257}, 422, None, "request_id", "256"),
    "row too big": ({**ROW, "entities": {"shop": "x" * 70_000, "item": 1}}, 422, 0, None, "65536 bytes"),
    "event_time": ({**ROW, "event_time": NOW}, 400, 0, "event_time", "allow_event_time"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_can_not_be_answered_is_a_4xx_that_names_it(service: Service, name: str) -> None:
    body, status, row, field, message = REFUSALS[name]
    reply = service.predict(body)
    error = reply.json()["error"]
    assert reply.status_code == status, reply.text
    assert message in error["message"]
    if row is not None:
        assert error["row"] == row
    if field is not None:
        assert error["field"] == field
    assert service.records() == []
    assert service.store.reads == 0
    assert service.predict(ROW).status_code == 200


@pytest.mark.parametrize("at", ["yesterday", "2013-01-15T07:00:00", 1.5, -1, 1 << 60, True, {}])
def test_a_wrong_event_time_is_refused(make: Make, at: Any) -> None:
    error = make(allow_event_time=True).predict({"rows": [{**ROW, "event_time": at}]})
    assert (error.status_code, error.json()["error"]["field"], error.json()["error"]["row"]) == (422, "event_time", 0)


def test_a_body_without_a_length_is_bounded_too(service: Service) -> None:
    async def chunks() -> Any:
        for _ in range(40):
            yield b" " * 65_536

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://p") as client:
            return await client.post("/predict", content=chunks())

    assert asyncio.run(go()).status_code == 413


def test_a_body_that_never_ends_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.predict_app.BODY_S", 0.05)

    async def stalled() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    sent = list[dict[str, Any]]()
    parts = stalled()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": await anext(parts), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b"", "root_path": ""}
    asyncio.run(service.app(scope, receive, send))
    assert sent[0]["status"] == 408


def test_any_content_type_and_unknown_names_are_taken(service: Service) -> None:
    body = json.dumps({**ROW, "more": 1, "entities": {**ROW["entities"], "x": 1}})  # type: ignore[dict-item]
    options = {"content": body, "headers": {"content-type": "text/plain"}}
    assert service.send(("POST", "/predict", options))[0].status_code == 200


def test_paths_and_methods_that_are_not_there_are_json(service: Service) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/predict", 405), ("POST", "/healthz", 405)):
        reply = service.send((method, path, {}))[0]
        assert (reply.status_code, path in reply.json()["error"]["message"]) == (status, True)


def test_without_the_store_every_view_is_missing_and_the_answer_comes(service: Service) -> None:
    stored(service)
    service.store.error = UnavailableError("no redis")
    answers = [service.predict(ROW).json()["rows"][0] for _ in range(3)]
    assert [a["missing"] for a in answers] == [["all_orders", "shop_item"]] * 3
    assert (service.metric("store_errors_total"), service.store.reads) == (3, 1)


def test_the_store_is_read_again_soon_after_it_is_back(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.predictor.STORE_PAUSE_S", 0.0)
    stored(service)
    service.store.error = UnavailableError("no redis")
    service.predict(ROW)
    service.store.error = None
    assert service.predict(ROW).json()["rows"][0]["missing"] == []


def test_a_full_spool_is_503_and_nothing_was_answered(make: Make) -> None:
    service = make(spool_bytes=10)
    reply = service.predict(ROW)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert "spool_max_mb" in reply.json()["error"]["message"]


def test_too_much_waiting_is_503(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.batcher.WAITING_ROWS", 1)
    assert service.predict({"rows": [ROW] * 2}).status_code == 503
    assert service.predict(ROW).status_code == 200


def test_a_score_that_is_no_number_is_answered_by_the_prior(service: Service, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "6", nan=True)
    good = save_model(tmp_path / "7")
    model = OnnxModel.load(good, "6")
    model._session = _session(folder / "model.onnx", model.inputs)
    service.slot.serving = Serving(model)
    assert service.predict({"rows": [ROW, ROW]}).json()["rows"][0]["score"] == 0.3
    assert service.metric("nan_scores_total") == 2
    assert service.records()[0][1]["score"] == 0.3


def test_an_error_in_one_request_does_not_touch_the_others(make: Make) -> None:
    """A derive function that fails on one shop: that caller gets a 500 in JSON, the batch's others their answers."""

    def derive(row: dict[str, Any]) -> dict[str, Any]:
        return {} if row["shop"] != "bad" else 1 / 0  # type: ignore[return-value]

    service = make(replace(use_case, derive=derive))
    rows = [{**ROW, "request_id": str(i), "entities": {"shop": "bad" if i == 3 else "a", "item": 1}} for i in range(8)]
    replies = service.send(*(("POST", "/predict", {"json": row}) for row in rows))
    assert [r.status_code for r in replies] == [500 if i == 3 else 200 for i in range(8)]
    assert "predictor's log" in replies[3].json()["error"]["message"]
    assert sorted(value["request_id"] for _, value in service.records()) == ["0", "1", "2", "4", "5", "6", "7"]


def test_health_readiness_and_metrics(make: Make) -> None:
    service = make()
    assert service.get("/healthz").json() == {"ok": True}
    assert service.get("/readyz").json() == {"ready": True, "generation": None, "champion": "prior"}
    assert service.metric("generation") == -1
    service.predict(ROW)
    assert service.metric("spool_bytes") == service.spool.waiting_bytes > 0
    assert service.metric("latency_seconds_count") == 1


def test_not_ready_is_503(tmp_path: Path) -> None:
    report = {"ready": False, "generation": None, "champion": "prior", "problem": "no broker"}
    spool = Spool(tmp_path, 1000)
    store = Store(MemoryStore(use_case))
    app = create_app(use_case, store, spool, ModelSlot(Serving(Prior(0.3))), Settings(), readiness=lambda: report)
    reply = Service(store, spool, ModelSlot(Serving(Prior(0.3))), app).get("/readyz")
    assert (reply.status_code, reply.json()) == (503, report)
    spool.close()


def test_the_openapi_example_is_a_request_that_works(make: Make) -> None:
    service = make(allow_event_time=True)
    operation = service.get("/openapi.json").json()["paths"]["/predict"]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    assert service.predict(example).status_code == 200
    assert {"200", "400", "413", "422", "503"} <= operation["responses"].keys()
