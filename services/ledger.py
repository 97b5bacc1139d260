"""Whether the continuous learner's ledger is exact: every example of its version learned or skipped, once."""

from __future__ import annotations

from typing import Any

import msgspec

from features.usecase import UseCase
from pipelines.broker import Broker
from pipelines.control import STATE_KEY
from pipelines.learning import REFRESH_KEY, SPANS_KEPT, Refresh, Row, examples_contract
from services.learning import learned_until, row_of
from services.report import verdict
from services.topic_reader import Newest, read_all

TITLE = "every label is learned or skipped, once"


def check(broker: Broker, use_case: UseCase) -> dict[str, Any] | None:
    """The champion's ledger beside `<uc>.examples`, up to where it says it is; None when nothing was refreshed."""
    models = Newest(broker, use_case.topic("models"))
    found = models.read()
    models.close()
    state = found.get(STATE_KEY)
    version = state["roles"]["champion"] if state else None
    raw = found.get(f"{REFRESH_KEY}{version}".encode())
    if not state or raw is None:
        return None
    refresh = msgspec.convert(raw, Refresh, strict=False)
    if len(refresh.spans) >= SPANS_KEPT:
        return verdict(TITLE, True, f"not checked: the ledger keeps its newest {SPANS_KEPT} spans")
    rows = [r for r in examples(broker, use_case) if r.value.label_time >= learned_until(state["versions"][version])]
    return verdict(TITLE, *compare(refresh, rows))


def examples(broker: Broker, use_case: UseCase) -> list[Row]:
    """Every example where it first is."""
    contract, first = examples_contract(use_case), dict[str, Row]()
    for record in read_all(broker, contract.topic):
        if row := row_of(contract, record):
            first.setdefault(row.value.request_id, row)
    return list(first.values())


def compare(refresh: Refresh, rows: list[Row]) -> tuple[bool, str]:
    """Whether the ledger accounts for the rows, and what it says; rows behind its end are still to come."""
    ends = {
        p: max(s.offsets[p][1] for s in refresh.spans if p in s.offsets)
        for p in {r.partition for r in rows}
        if any(p in s.offsets for s in refresh.spans)
    }
    due = [r for r in rows if r.offset < ends.get(r.partition, 0)]
    wrong = 0
    counted = [0] * len(refresh.spans)
    for row in due:
        holding = [i for i, span in enumerate(refresh.spans) if span.has(row)]
        wrong += len(holding) != 1
        for i in holding:
            counted[i] += 1
    miscounted = sum(n != span.examples for n, span in zip(counted, refresh.spans, strict=True))
    learned = sum(n for n, span in zip(counted, refresh.spans, strict=True) if not span.reason)
    exact = not wrong and not miscounted and (learned, len(due) - learned) == (refresh.learned, refresh.skipped)
    told = (
        f"version {refresh.version} refresh {refresh.number}: {refresh.learned:,} learned, {refresh.skipped:,} skipped"
    )
    return exact, f"{told} of {len(due):,} examples, {wrong} in none or two, {miscounted} spans miscounted"
