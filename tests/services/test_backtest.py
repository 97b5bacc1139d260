"""A backtest from the command line to its files: cached, stopped and resumed, checked."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from features.errors import InputError
from features.usecase import load
from pipelines import registry
from services import backtest as runs
from services import backtest_check, cli
from services.backtest import Backtest, Plan, default_score_from
from services.backtest_data import DAY_MS, Range

SPRING = 1_767_225_600_000  # 2026-01-01, when the clicks begin
OVER = Range(SPRING, SPRING + 3 * DAY_MS)
PLAN = Plan("clicks", OVER, SPRING + DAY_MS, ("lightgbm:every_days=1,rounds=20", "constant"))


class Runs:
    """Stands for MLflow: takes what is logged at a database of one's own, nothing at a server."""

    logged: dict[str, Any]

    def __init__(self, url: str) -> None:
        self.url = url

    def log_run(self, experiment: str, params: Any, metrics: Any, folder: Path, artifacts: str) -> tuple[str, str]:
        if self.url.startswith("http"):
            raise registry.UnavailableError("away")
        Runs.logged = {
            "experiment": experiment,
            "params": params,
            "metrics": metrics,
            "files": sorted(folder.iterdir()),
        }
        return "1", "run"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def command(*more: str, home: Path) -> Any:
    span = ["--from", "2026-01-01", "--until", "2026-01-04", "--score-from", "2026-01-02"]
    learners = [part for name in PLAN.learners for part in ("--learner", name)]
    found = CliRunner().invoke(
        cli.app, ["backtest", "clicks", *span, *learners, *more], env={"PENSTOCK_HOME": str(home)}
    )
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def test_the_command_compares_learners_and_logs_a_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "Registry", Runs)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    blend = "lightgbm:every_days=1,rounds=20+constant"
    done = command("--json", "--learner", blend, home=home)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    first, constant = (result["learners"][name] for name in PLAN.learners)
    assert {k: result[k] for k in ("auc", "log_loss", "brier", "months")} == {
        k: first[k] for k in ("auc", "log_loss", "brier", "months")
    }
    assert 0.58 < first["auc"] < 0.82 and first["log_loss"] < constant["log_loss"] and result["events_per_s"] > 0
    assert [m["month"] for m in result["months"]] == ["2026-01"] and result["scored"] == first["examples"]
    assert [(d["learner"], d["against"]) for d in result["differences"]["all"]] == [
        (PLAN.learners[0], "constant"), (PLAN.learners[0], blend), ("constant", blend)
    ]  # fmt: skip
    assert result["differences"]["all"][0]["log_loss"]["high"] < 0
    page = Path(result["report"]).read_text()
    assert "AUC by month" in page and PLAN.learners[0] in page and "constant" in page
    assert Runs.logged["params"]["lightgbm.rounds"] == "20" and Runs.logged["params"]["code_version"]
    assert Runs.logged["metrics"]["auc"] == result["auc"] and len(Runs.logged["files"]) == 2
    again = command(home=home)
    assert "AUC" in again.stdout and f"{result['auc']:.4f}".removeprefix("0") in again.stdout


def test_a_stopped_run_goes_on_to_the_same_scores(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, update_every=200)
    whole, _ = Backtest(home / "other", plan, shown=False).scores(PLAN.learners[0])
    test, turned = Backtest(home, plan, shown=False), runs.Kept.turned

    def stop(self: runs.Kept, position: Any, now_ms: int) -> None:
        turned(self, position, now_ms)
        if position.turns == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "SAVE_S", 0.0)
    monkeypatch.setattr(runs.Kept, "turned", stop)
    with pytest.raises(KeyboardInterrupt):
        test.scores(PLAN.learners[0])
    positions: list[int] = []
    monkeypatch.setattr(runs.Kept, "turned", lambda self, position, now: positions.append(position.turns))
    scores, _ = test.scores(PLAN.learners[0])
    assert positions[0] == 16 and np.array_equal(scores, whole) and not list(home.rglob("*.part"))


def test_the_check_notices_what_is_spoiled(home: Path) -> None:
    result = backtest_check.check(runs.Settings(home=home), PLAN)
    verdicts = {c["check"]: c for c in result["checks"]}
    failed = [c for c in verdicts.values() if not c["ok"]]
    assert [c["check"] for c in failed] in ([], ["labels 24 h later: worse"])  # two days of clicks may not tell
    assert result["auc"]["labels permuted"] == pytest.approx(0.5, abs=0.02)
    assert result["auc"]["the label among the inputs"] > 0.82


def test_labels_permuted_or_delayed_change_nothing_else(home: Path) -> None:
    plain = Backtest(home, PLAN, shown=False).examples
    permuted = Backtest(home, replace(PLAN, permute=True), shown=False).examples
    delayed = Backtest(home, replace(PLAN, delay=DAY_MS), shown=False).examples
    assert permuted.label.sum() == plain.label.sum() and (permuted.label != plain.label).any()
    assert np.array_equal(permuted.label_time, plain.label_time)
    assert np.array_equal(delayed.label_time, plain.label_time + DAY_MS) and np.array_equal(delayed.label, plain.label)
    assert load("clicks").inputs == Backtest(home, PLAN, shown=False).use_case.inputs


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"score_from": SPRING - 1}, "score-from"),
        ({"over": replace(OVER, tick=7 * 60_000)}, "--tick"),
        ({"learners": ("constant+nobody",)}, "nobody"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changed: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(PLAN, **changed).check()


def test_scores_begin_after_a_month_or_a_third() -> None:
    year = Range(1_356_998_400_000, 1_388_534_400_000)
    assert default_score_from(year) == 1_359_676_800_000  # 1 February
    assert default_score_from(OVER) == SPRING + DAY_MS
