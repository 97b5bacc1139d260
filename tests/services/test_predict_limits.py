"""Who may ask, how long one waits, what a full spool does, and what several processes say together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest

from features.errors import ConfigError
from services.batcher import Batcher
from services.predict_request import Asked
from services.predict_workers import Siblings
from services.serve import _spool_folders, serve
from services.settings import Settings
from tests.predict_rig import ROW, Make, Service


def asked(service: Service, **headers: str) -> httpx.Response:
    return service.send(("POST", "/predict", {"json": ROW, "headers": headers}))[0]


def test_with_a_token_only_who_has_it_may_make_predictions(make: Make) -> None:
    service = make(predictor_token="s3cret")
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "s3cret"}):
        assert asked(service, **headers).status_code == 401
    assert service.records() == []
    assert asked(service, authorization="Bearer s3cret").status_code == 200
    assert service.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"predictor_host": "0.0.0.0"}, "predictor_token"),
        ({"predictor_host": "somewhere"}, "predictor_token"),
        ({"predictor_workers": 0}, "predictor_workers"),
        ({"spool_when_full": "burn"}, "refuse or drop"),
    ],
)
def test_settings_that_are_no_good_are_refused_before_anything_starts(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        serve(Settings(**settings), "flights")


@pytest.mark.parametrize("text", ["", "-1", "1.5", "soon", "9999999999"])
def test_a_deadline_that_is_no_number_is_refused(service: Service, text: str) -> None:
    assert asked(service, **{"x-deadline-ms": text}).status_code == 400


def test_a_request_past_its_deadline_is_503_and_not_scored(service: Service) -> None:
    reply = asked(service, **{"x-deadline-ms": "0"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert service.store.reads == 0 and service.records() == []
    assert asked(service, **{"x-deadline-ms": "4000"}).status_code == 200


def test_only_those_whose_deadline_is_over_are_left_out_of_a_batch() -> None:
    batches = list[list[str]]()

    def answer(rows: Any) -> Any:
        batches.append([row.request_id for row in rows])
        return [row.request_id for row in rows], True

    async def go() -> list[Any]:
        batcher = Batcher(answer, clock=lambda: 10.0)
        rows = ((Asked(str(i), {}, {}, None), at) for i, at in enumerate((11.0, 9.0, 10.5)))
        return await asyncio.gather(*(batcher.submit([row], at) for row, at in rows), return_exceptions=True)

    first, second, third = asyncio.run(go())
    assert (batches, first, third) == ([["0", "2"]], (["0"], True), (["2"], True))
    assert "deadline" in str(second)


def test_a_full_spool_may_drop_the_record_and_say_so(make: Make) -> None:
    service = make(spool_bytes=10, spool_when_full="drop")
    reply = asked(service)
    assert (reply.status_code, reply.headers["x-prediction-log"]) == (200, "dropped")
    assert (service.records(), service.metric("dropped_rows_total")) == ([], 1)


def test_processes_on_one_port_report_the_one_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = Siblings([1, 2])
    answers = ['{"ready": true, "generation": 7, "champion": "3"}', '{"ready": true, "generation": 6, "champion": "2"}']

    async def ask(path: str) -> list[str]:
        return answers

    monkeypatch.setattr(siblings, "_ask", ask)
    assert asyncio.run(siblings.readiness())["champion"] == "2"
    answers[0] = ""
    report = asyncio.run(siblings.readiness())
    assert (report["ready"], report["problem"]) == (False, "worker 0 does not answer")


def test_metrics_of_processes_carry_their_number(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    service, siblings = make(), Siblings([1, 2])
    assert asked(service).status_code == 200
    text = service.get("/metrics").text

    async def ask(path: str) -> list[str]:
        return [text, text]

    monkeypatch.setattr(siblings, "_ask", ask)
    merged = generate_latest(asyncio.run(siblings.metrics())).decode()  # type: ignore[arg-type]
    for worker in "01":
        assert f'penstock_predict_requests_total{{status="200",worker="{worker}"}} 1.0' in merged
    assert merged.count("# TYPE penstock_predict_requests_total counter") == 1


def test_fewer_workers_ship_what_more_have_left(tmp_path: Path) -> None:
    for name in ("7000", "7000.1", "7000.2", "7001.1"):
        (tmp_path / name).mkdir()
    assert [f.name for f in _spool_folders(tmp_path, 7000, 1, 2)] == ["7000.1"]
    assert [f.name for f in _spool_folders(tmp_path, 7000, 0, 2)] == ["7000", "7000.2"]
    assert sorted(f.name for f in _spool_folders(tmp_path, 7000, 0, 1)) == ["7000", "7000.1", "7000.2"]
