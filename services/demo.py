"""`make demo`: the whole loop on real flights, and a report of what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from features.errors import StateError
from features.usecase import load
from services import audit, report, stack
from services.replay import replay
from services.replay_session import to_ms
from services.retrain_wait import RetrainWait
from services.settings import Settings
from services.source import source_of

USE_CASE = "flights"
FROM, UNTIL = datetime(2013, 1, 1, tzinfo=UTC), datetime(2013, 2, 16, tzinfo=UTC)
SCORED = timedelta(days=15)  # the report's headline is about February
TICK = timedelta(minutes=15)


def demo(
    settings: Settings,
    *,
    keep: bool = False,
    fresh: bool = False,
    attach: bool = False,
    from_: datetime = FROM,
    until: datetime = UNTIL,
    tick: timedelta = TICK,
    as_json: bool = False,
) -> int:
    """Bring the stack up, replay in lockstep with a retrain at every cut, report and audit; the exit code.

    A demo that was cut off goes on; one that is complete is reported again from what it left, in a moment.

    keep : leave the stack up
    fresh : delete the state of an earlier demo first
    attach : start none, replay into the stack that the settings name
    """
    run = {"from": to_ms(from_), "until": to_ms(until), "tick": to_ms(datetime.fromtimestamp(0, UTC) + tick)}
    with contextlib.redirect_stdout(sys.stderr):
        if fresh:
            clear(settings)
        found = finished(settings, run)
        if found is not None:
            print(f"the replay in {settings.home} is complete: reporting it again (a new one: --fresh)")
        if found is None or keep:
            os.environ["PENSTOCK_ALLOW_EVENT_TIME"] = "true"  # the stack's processes inherit it
            own = contextlib.nullcontext(settings) if attach else stack.running(settings, (USE_CASE,), keep=keep)
            with own as ready:
                found = found or _run(ready, run, from_, until, tick)
        paths = report.write(found, settings.home)
    if as_json:
        print(json.dumps(found))
    else:
        print(report.as_text(found))
        print("\n" + "\n".join(str(path) for path in paths))
        if not attach:
            print("the stack stays up: `penstock down` stops it" if keep else "`make demo` with --keep leaves it up")
    return 0 if all(check["ok"] for check in found["checks"]) else 1


def _run(settings: Settings, run: dict[str, int], from_: datetime, until: datetime, tick: timedelta) -> report.Report:
    """The replay, its report and the audit."""
    from services.wiring import broker

    use_case, began = load(USE_CASE), time.monotonic()
    waits = RetrainWait(settings, use_case, broker(settings), run["from"])
    try:
        done = replay(settings, use_case, source_of(USE_CASE), from_, until, tick=tick, at_tick=waits)
    finally:
        waits.close()
    print(done)
    score_from = max(run["from"], to_ms(until - SCORED))
    found = report.build(settings, use_case, score_from, run["until"])
    print("audit: recomputing what was served from the raw events")
    found["checks"] += audit.audit(settings, use_case)
    return found | {"run": run, "wall_s": round(time.monotonic() - began, 1)}


def finished(settings: Settings, run: dict[str, int]) -> dict[str, Any] | None:
    """The report of an earlier demo of this very range and tick, if there is one."""
    path = settings.home / "report.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found.get("run") == run else None


def clear(settings: Settings) -> None:
    """Delete the embedded stack's state; StateError while it runs or when the folder isn't ours."""
    if not settings.home.exists():
        return
    if stack.status(settings)["running"]:
        raise StateError(f"a stack is running in {settings.home}: stop it with `penstock down` first")
    if not (settings.home / "secrets.json").exists():
        raise StateError(f"{settings.home} is not a folder of ours: it has no secrets.json; delete it yourself")
    shutil.rmtree(settings.home)
