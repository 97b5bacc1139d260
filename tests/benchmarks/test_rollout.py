"""`penstock bench rollout` trains the learners that it replays."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from benchmarks import rollout
from services.cli import WithoutTorch, app


def test_it_may_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line forbids it to processes that don't train."""
    monkeypatch.setattr(sys, "meta_path", [WithoutTorch(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(rollout, "bench", lambda days: {"days": days, "found": find_spec("torch") is not None})
    result = CliRunner().invoke(app, ["bench", "rollout", "--days", "3", "--json"])
    assert json.loads(result.stdout) == {"days": 3, "found": True}, result.output
