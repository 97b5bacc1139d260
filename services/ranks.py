"""Horovod ranks as child processes on this machine: start them, relay their progress, leave none behind."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from features.errors import PenstockError
from services.settings import ROOT

NICENESS = 10
PR_SET_PDEATHSIG = 1
GRACE_S = 10.0  # for the ranks to end once the result is there, or once they are told to
POLL_S = 0.1
PROGRESS = re.compile(r"^\[\d+\]<stdout>:(train: .*)$")
RANK = re.compile(r"^\[\d+\]<std(out|err)>:")
KEPT_LINES = 40


def run_ranks(
    module: str, argument: Path, ranks: int, folder: Path, result: Path, timeline: Path | None = None
) -> None:
    """Run `python -m module argument` on `ranks` elastic Horovod ranks until `result` exists.

    Two host names of one machine share the ranks, because a dead rank takes its host out for some seconds; the
    survivors go on meanwhile. Ranks come and go as `folder`/hosts is edited while they run. Printed: progress lines of
    rank 0. Everything goes to `folder`/ranks.log; what is exchanged when to the file `timeline`, as a Chrome trace.

    Raises
    ------
    PenstockError : the job ended without the result; the message has the last lines of the log
    """
    trace = ["--timeline-filename", str(timeline.absolute())] if timeline else []
    command = [*_horovodrun(ranks, _discovery(folder, ranks)), *trace, sys.executable, "-m", module, str(argument)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment["HOROVOD_STALL_CHECK_SHUTDOWN_TIME_SECONDS"] = "120"
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        os.nice(NICENESS)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    with open(folder / "ranks.log", "w", buffering=1) as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=in_child,
        )
        lines: deque[str] = deque(maxlen=KEPT_LINES)
        reader = threading.Thread(target=_relay, args=(process, log, lines), daemon=True)
        reader.start()
        try:
            _wait(process, result)
        finally:
            process.kill()  # whatever ends horovodrun, the guard process of each rank sees it and ends the rank
            process.wait()
            reader.join(GRACE_S)  # the guards hold the pipe: at its end they are gone
    if not result.exists():
        raise PenstockError(_why(lines))


def _why(lines: Sequence[str]) -> str:
    """What the ranks said: the first error of ours in one line, or their last lines."""
    ranks = [line.partition(":")[2] for line in lines if RANK.match(line)]
    ours = [line.removeprefix("penstock: ") for line in ranks if line.startswith("penstock: ")]
    return f"the training job failed: {ours[0]}" if ours else "\n".join(["the training job failed:", *(ranks or lines)])


def _horovodrun(ranks: int, discovery: Path) -> list[str]:
    elastic = ["--min-np", "1", "--blacklist-cooldown-range", "2", "6"]
    timeouts = ["--start-timeout", "60", "--elastic-timeout", "60"]
    place = ["--network-interfaces", "lo", "--host-discovery-script", str(discovery)]
    return [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", str(ranks), *elastic, *timeouts, *place]


def _discovery(folder: Path, ranks: int) -> Path:
    """The script that tells Horovod the hosts: whatever the file `hosts` beside it lists now."""
    slots: Sequence[tuple[str, int]] = [("localhost", ranks - ranks // 2), ("127.0.0.1", ranks // 2)]
    (folder / "hosts").write_text("".join(f"{host}:{n}\n" for host, n in slots if n))
    script = folder / "discover"
    script.write_text('#!/bin/sh\ncat "${0%/*}/hosts"\n')
    script.chmod(0o755)
    return script


def _relay(process: subprocess.Popen[str], log: TextIO, lines: deque[str]) -> None:
    assert process.stdout
    with process.stdout:
        for line in process.stdout:
            log.write(line)
            if progress := PROGRESS.match(line):
                print(progress[1], flush=True)
            else:
                lines.append(line.rstrip())


def _wait(process: subprocess.Popen[str], result: Path) -> None:
    """Until the job has ended; a rank that joins at the very end must not hold a finished job."""
    ends = float("inf")
    while process.poll() is None and time.monotonic() < ends:
        if ends == float("inf") and result.exists():
            ends = time.monotonic() + GRACE_S
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            continue
