"""Records read straight into columns: what is read, and refused, is what the decoder of structs has."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from features.columns import Coder
from features.contracts import Contract, Field, Invalid
from features.json_events import Cells, Layout, read_objects
from features.kernel import NULL
from features.texts import Texts
from features.values import Parsed, Structs, layout, read_values

contract = Contract(
    "measured",
    (
        Field("id", str),
        Field("at", "time"),
        Field("count", int),
        Field("price", float),
        Field("kind", str, optional=True),
        Field("size", int, optional=True),
        Field("weight", float, optional=True),
        Field("seen", "time", optional=True),
        Field("new", bool),
        Field("paid", bool, optional=True),
    ),
    time="at",
    id="id",
    max_bytes=400,
)
plain = {"id": "a", "at": 5, "count": 1, "price": 0.5, "new": True}
times = st.one_of(
    st.integers(-1, 253_402_300_800_001),
    st.datetimes().map(lambda t: t.isoformat() + "Z"),
    st.datetimes().map(lambda t: t.isoformat(timespec="milliseconds") + "+05:30"),
    st.sampled_from(["2012-02-29T00:00:00Z", "2013-02-29T00:00:00Z", "2013-01-01 00:00:00Z", "2013-01-01T00:00:60Z"]),
    st.sampled_from(["2013-01-01T00:00:00", "1970-01-01T00:00:00+00:01", "2013-01-01T00:00:00.12345678Z", "", "Z"]),
)
values: dict[str, Any] = {
    "id": st.text(max_size=8),
    "at": times,
    "count": st.one_of(st.integers(-(2**65), 2**65), st.floats()),
    "price": st.one_of(st.floats(), st.integers(-(10**20), 10**20), st.decimals(-1000, 1000, places=3).map(float)),
    "kind": st.one_of(st.none(), st.text(max_size=4), st.booleans()),
    "size": st.one_of(st.none(), st.integers()),
    "weight": st.one_of(st.none(), st.floats(allow_nan=False)),
    "seen": st.one_of(st.none(), times),
    "new": st.one_of(st.booleans(), st.none(), st.just(0)),
    "paid": st.one_of(st.none(), st.booleans()),
    "more": st.one_of(st.none(), st.lists(st.integers()), st.text()),
}
optional = ("kind", "size", "weight", "seen", "paid", "more")
objects = st.fixed_dictionaries({n: values[n] for n in plain}, optional={n: values[n] for n in optional})


@st.composite
def records(draw: Any) -> bytes | None:
    """Records as producers send them, and as nobody should."""
    row = draw(st.one_of(objects, st.just(plain), objects.map(lambda o: plain | {n: o[n] for n in o if n in optional})))
    text = json.dumps(
        dict(draw(st.permutations(list(row.items())))),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
    )
    raw = text.encode(errors="surrogatepass")
    match draw(st.integers(0, 12)):
        case 0:
            at = draw(st.integers(0, len(raw)))
            return raw[:at] + draw(st.binary(max_size=3)) + raw[at + draw(st.integers(0, 2)) :]
        case 1:
            return draw(st.one_of(st.none(), st.binary(max_size=6), st.just(raw[:-1] + b',"id":"b"}')))
    return raw


def same(a: Any, b: Any) -> bool:
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@settings(max_examples=600, deadline=None)
@given(st.lists(records(), max_size=6))
@example([json.dumps(plain | {"price": -0.0}).encode(), json.dumps(plain | {"price": 1e-300}).encode()])
@example([json.dumps(plain).encode() + b" ", b"\t" + json.dumps(plain).encode(), b"{}", None, b""])
@example([b'{"id":"x","at":1e3,"count":1.0,"price":1E5,"new":true}'])
@example([b'{"id":"x","at":01,"count":-0,"price":1.,"new":true}'])
@example([b'{"id":"\xc3","at":1,"count":1,"price":1,"new":true}', json.dumps(plain).encode()])
@example([b'{"id":"\xc3\xa9","at":1,"count":1,"price":1,"new":true}', b'{"\\u0069d":"x"}'])
@example([b'{"id":"x","at":1,"count":1,"price":1,"new":true,"\x80":null}'])
def test_reads_what_the_decoder_of_structs_reads(raws: list[bytes | None]) -> None:
    read, expected = read_values(contract, raws), contract.decode_many(raws)
    assert [(i, e.reason, e.detail) for i, e in read.bad.items()] == [
        (i, e.reason, e.detail) for i, e in enumerate(expected) if isinstance(e, Invalid)
    ]
    kept = np.array([i for i in range(len(raws)) if i not in read.bad], np.int64)
    found, structs = read.values.take(kept), [e for e in expected if not isinstance(e, Invalid)]
    assert isinstance(found, Parsed) and list(found.structs()) == structs
    assert read.unknown == contract.unknown([raws[i] or b"" for i in kept.tolist()])
    for field in contract.fields:
        own = Structs(structs)
        assert all(map(same, found.plain(field.name), own.plain(field.name)))
        np.testing.assert_array_equal(found.column(field), own.column(field))
        assert found.column(field).dtype == own.column(field).dtype


def test_plain_records_are_read_by_the_compiled_reader() -> None:
    """All of a usual producer's; the uncompiled function agrees."""
    rows = [
        plain | {"kind": None, "size": -3, "weight": 12.25, "seen": "2013-01-01T05:15:00.250-05:00", "paid": False},
        plain | {"at": "2013-06-01T00:00:00Z", "price": 100, "kind": "\u00e9"},
        plain | {"price": -3.5e-3},
    ]
    for separators in ((",", ":"), (", ", ": ")):
        raws = [json.dumps(row, separators=separators, ensure_ascii=False).encode() for row in rows]
        form, ends = layout(contract), np.cumsum([len(raw) for raw in raws])
        assert isinstance(form, Layout)
        data, found = np.frombuffer(b"".join(raws), np.uint8), []
        for read in (read_objects, read_objects.py_func):  # type: ignore[attr-defined]
            cells, fine = Cells.empty(len(contract.fields), 3), np.zeros(3, bool)
            cells.integers[:], cells.until[:] = NULL, NULL
            read(data, ends, form, cells, fine)
            assert fine.all()
            found.append((cells.integers.tolist(), cells.until.tolist()))
        assert found[0] == found[1]


@settings(deadline=None)
@given(st.lists(st.lists(st.one_of(st.none(), st.text(max_size=6)), max_size=12), max_size=8))
def test_texts_have_the_codes_of_the_dictionary(batches: list[list[str | None]]) -> None:
    coder = Coder()
    coder.texts = Texts(2)
    for batch in batches:
        encoded = [(text or "").encode(errors="replace") for text in batch]
        lengths = np.array([len(raw) for raw in encoded], np.int64)
        ends = np.cumsum(lengths)
        starts = np.where(np.array([text is None for text in batch], bool), NULL, ends - lengths)
        given = [None if text is None else raw.decode() for text, raw in zip(batch, encoded, strict=True)]
        codes = coder.encode_texts(np.frombuffer(b"".join(encoded), np.uint8), starts, ends)
        assert codes.tolist() == coder.encode(given).tolist()
        assert coder.decode(codes).tolist() == given


def test_a_contract_with_free_json_is_read_as_structs() -> None:
    free = Contract("free", (Field("at", "time"), Field("body", dict)), time="at")
    read = read_values(free, [b'{"at":1,"body":{"a":1},"more":1}', b"{", b'{"at":2,"body":{}}'])
    assert isinstance(read.values, Structs) and list(read.bad) == [1] and read.unknown == 1
    assert read.values.take(np.array([2])).plain("body") == [{}]
    assert read.values.texts("body") is None


@pytest.mark.parametrize("size", [1, 3, 50])
def test_values_are_taken_and_joined(size: int) -> None:
    raws = [json.dumps(plain | {"id": f"\u00e9{i}", "kind": None if i % 3 else f"k{i}"}).encode() for i in range(100)]
    whole = read_values(contract, raws).values
    parts = [read_values(contract, raws[i : i + size]).values for i in range(0, 100, size)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.joined(part)
    for rows in (np.arange(100), np.arange(7, 30), np.array([5, 3, 99]), np.zeros(0, np.int64)):
        for name in ("id", "kind", "at"):
            assert joined.take(rows).plain(name) == whole.take(rows).plain(name)
        assert [v.id for v in joined.take(rows).structs()] == [f"\u00e9{i}" for i in rows.tolist()]
