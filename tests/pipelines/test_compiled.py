"""What set-up compiles is all that steps run: else the first events would wait for a compiler."""

from __future__ import annotations

import subprocess
import sys

from services.setup.doctor import ROOT

SCRIPT = """
from numba.core.dispatcher import Dispatcher
from features import engine, json_events, kernel, texts, timers
from features.usecase import load
from pipelines import seen
from pipelines.broker import Record
from pipelines.featurizer import Featurizer
from pipelines.task import Task
from services import timetable

def compiled():
    modules = (engine, json_events, kernel, seen, texts, timers)
    found = [(m.__name__, name, f) for m in modules for name, f in vars(m).items() if isinstance(f, Dispatcher)]
    return {(m, name, str(s)) for m, name, f in found for s in f.nopython_signatures}

for module in (engine, seen):
    module.compile_kernels()
before, use_case, start = compiled(), load("flights"), timetable.OPENING
task, rows, offset = Task(use_case, Featurizer(use_case)), 0, 0
for hour in range(0, 30 * timetable.HOUR, timetable.HOUR):
    records = []
    for event in timetable.events(start + hour, start + hour + timetable.HOUR):
        for _ in range(2):  # each one twice: duplicates
            records.append(Record(use_case.topic(event.event), 0, offset, event.time, event.key, event.value))
            offset += 1
    rows += sum(len(r.times) for r in task.advance(records, at_least=start + hour).online)
    if hour % (5 * timetable.HOUR) == 0:
        saved, task = task.snapshot(), Task(use_case, Featurizer(use_case))
        task.restore(saved, [])
assert rows > 1000 and task.intake.counts["duplicate"] > 1000, (rows, task.intake.counts)
assert compiled() == before, compiled() - before
"""


def test_no_featurizer_compiles_anything() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
