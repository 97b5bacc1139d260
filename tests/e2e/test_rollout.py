"""A challenger with a corrupted feature, in a replay of real flights: it is rolled back by itself, and what callers
got of it is told.

PENSTOCK_ROLLOUT_DAYS (default 12) days after the first version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from features.flights import use_case
from features.usecase import ModelInputs
from pipelines.onnx_model import example_inputs, record_example
from services import report, rollout, stack, wiring
from services.replay import replay
from services.replay_session import to_ms
from services.retrain_wait import RetrainWait
from services.settings import ROOT, Settings
from services.source import source_of
from tests.conftest import free_ports

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
FROM, FIRST = datetime(2013, 1, 7, tzinfo=UTC), datetime(2013, 1, 10, 6, tzinfo=UTC)
UNTIL = FIRST + timedelta(days=int(os.environ.get("PENSTOCK_ROLLOUT_DAYS", "12")))
CORRUPTED = "_delay_mean_"  # these features come with the wrong sign


def corrupted(good: Path, folder: Path) -> Path:
    """The files of a version whose graph turns the sign of some features around: sound but for that."""
    folder.mkdir()
    declared = ModelInputs.from_json(json.loads((good / "inputs.json").read_bytes()))
    model = onnx.load(good / "model.onnx")
    signs = np.array([-1.0 if CORRUPTED in name else 1.0 for name in declared.numbers], np.float32)
    for node in model.graph.node:
        node.input[:] = ["corrupted" if name == "numbers" else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(signs, "signs"))
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["numbers", "signs"], ["corrupted"]))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "inputs.json").write_bytes((good / "inputs.json").read_bytes())
    inputs = example_inputs(declared, json.loads((good / "example.json").read_bytes()))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (score,) = session.run(["score"], {"numbers": inputs.numbers, "ids": inputs.ids})
    (folder / "example.json").write_text(json.dumps(record_example(declared, inputs, np.ravel(score))))
    return folder


def penstock(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "penstock"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_corrupted_challenger_rolls_back_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"PENSTOCK_HOME": str(tmp_path / "home"), "PENSTOCK_PORT_BASE": str(free_ports())}
    place |= {"PENSTOCK_ALLOW_EVENT_TIME": "true", "PENSTOCK_ROLLOUT_POLICY": "standard"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with stack.running(Settings.load(), ("flights",)) as settings:
        waits = RetrainWait(settings, use_case, wiring.broker(settings), to_ms(FROM))
        replay(settings, use_case, source_of("flights"), FROM, FIRST, at_tick=waits, progress=False)
        waits.close()
        registry = wiring.registry(settings)
        (first,) = registry.versions("flights")
        good = registry.download("flights", first.version, tmp_path / "good")
        bad = registry.register("flights", corrupted(good, tmp_path / "bad"), {}, {"made_by": "test"})
        assert "unseen by callers" in penstock("rollout", "flights", "consider", bad)
        replay(settings, use_case, source_of("flights"), FIRST, UNTIL, progress=False)
        state = rollout.status(settings, "flights")
        about = [d for d in state["decisions"] if d["version"] == bad]
        told = report.build(settings, use_case, to_ms(FIRST), to_ms(UNTIL))
        answers = {v: told["by_version"].get(v) for v in (first.version, bad)}
        print(json.dumps({"decisions": about, "answers": answers}, indent=1))
        assert [d["action"] for d in about][-1] == "rolled_back"
        assert state["roles"]["champion"] == first.version and state["roles"]["challenger"] != bad
        assert [v["sentence"] for v in told["versions"] if v["version"] == bad] == [d["sentence"] for d in about]
        assert all(check["ok"] for check in told["checks"] if check["check"] == "answers are logged")
        share = (answers[bad] or {"examples": 0})["examples"] / told["scored"]["examples"]
        assert share < 0.15
