"""`penstock bench rollout` trains the learners that it replays, and a bench's figures are shown whatever they are."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from benchmarks import rollout
from benchmarks.rig import as_text
from services.cli import WithoutTorch, app


def test_it_may_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line forbids it to processes that don't train."""
    monkeypatch.setattr(sys, "meta_path", [WithoutTorch(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(rollout, "bench", lambda days: {"days": days, "found": find_spec("torch") is not None})
    result = CliRunner().invoke(app, ["bench", "rollout", "--days", "3", "--json"])
    assert json.loads(result.stdout) == {"days": 3, "found": True}, result.output


def test_figures_of_any_kind_are_shown() -> None:
    found = {"challenger": "online", "rows": 12_345, "ratio": 1.5, "exact": True, "none": None, "by": {"all": 2}}
    shown = [line.split() for line in as_text(found).splitlines()]
    expected = [["challenger", "online"], ["rows", "12,345"], ["ratio", "1.5"], ["exact", "True"], ["none", "None"]]
    assert shown == [*expected, ["by"], ["all", "2"]]
