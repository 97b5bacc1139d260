"""Many records at once decode to what each alone does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.contracts import Contract, Field, Invalid

contract = Contract(
    "seen",
    (Field("id", str), Field("at", "time"), Field("n", int, optional=True), Field("x", float, optional=True)),
    time="at",
    max_bytes=100,
)
GOOD = (
    b'{"id": "1", "at": 5}',
    b'{"at": "2026-01-01T00:00:00Z", "id": "2", "n": 9007199254740993, "more": {"deep": [1]}}',
    b'{"id": "3", "at": 7, "x": 1e300}',
)
BAD = (
    None,
    b"",
    b"{",
    b'{"id": "1", "at": 5}{"id": "2", "at": 6}',
    b'{"id": "1", "at": 5}\n{"id": "2", "at": 6}',
    b'{"id": "1", "at": {"a": 1}',
    b'{"id": "1", "at": 5, "n": [{}',
    b"{}]}",
    b'{"id": "1", "at": -1}',
    b'{"id": "1", "at": "2026-01-01T00:00:00"}',
    b'{"id": "1", "at": 5, "n": 9223372036854775808}',
    b'{"id": "1", "at": 5, "x": 1e999}',
    b'{"id": "1", "at": 5, "x": NaN}',
    b'{"id": "\xff", "at": 5}',
    b'{"id": "' + b"a" * 100 + b'", "at": 5}',
    b"[]",
)


def alone(raw: bytes | None) -> Any:
    try:
        return contract.decode(raw)
    except Invalid as invalid:
        return (invalid.reason, invalid.detail)


@given(st.lists(st.sampled_from(GOOD), max_size=20), st.lists(st.sampled_from(BAD), max_size=3), st.randoms())
def test_together_as_alone(good: list[bytes], bad: list[bytes | None], rng: Any) -> None:
    raws = [*good, *bad]
    rng.shuffle(raws)
    together = [(v.reason, v.detail) if isinstance(v, Invalid) else v for v in contract.decode_many(raws)]
    assert together == [alone(raw) for raw in raws]


@pytest.mark.parametrize("raw", BAD)
def test_each_bad_record_is_refused(raw: bytes | None) -> None:
    (found,) = contract.decode_many([raw])
    assert isinstance(found, Invalid)


def test_records_with_fields_of_no_contract_are_counted() -> None:
    known, more = b'{"a": 1, "at": 5}', b'{"a": 1, "b": {"c": 2}, "at": 5}'
    contract = Contract("c", (Field("a", int), Field("at", "time")), time="at")
    assert [contract.unknown(raws) for raws in ([], [known], [more, known, more])] == [0, 0, 2]
    assert contract.unknown([b'{"a": 1, "\x80": 2, "at": 5}']) == 1, "a name that isn't text ends nothing"
    assert replace(contract, partial=True).unknown([more]) == 0
