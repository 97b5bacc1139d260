"""Feature vectors as other servers' clients send them: the Open Inference Protocol v2 and MLflow's `/invocations`.

Their columns are the model's inputs by feature name: numbers FP64 (NaN is null), ids BYTES or INT64, each list of an
event sequence BYTES that hold JSON. They are scored as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypedDict

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from features.usecase import ModelInputs
from services.predict_request import MAX_ROWS, Refused

DTYPES = {"FP64": "<f8", "FP32": "<f4", "INT64": "<i8", "INT32": "<i4", "INT16": "<i2", "INT8": "i1", "BOOL": "?"}
KINDS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("INT64", "int", "time"), ("INT64", int | None)),
    **dict.fromkeys(("DOUBLE", "float"), ("FP64", float | None)),
    **dict.fromkeys(("STRING", "str"), ("BYTES", str | None)),
    "bool": ("BOOL", bool | None),
}
Values = tuple[Any, ...]  # of a vector, in the order of the model's columns
NUMBER, LIST = ("FP64", float | bool | None), ("BYTES", list[float | None] | None)


class Schema:
    """What a model reads, in the order of its columns: `datatypes` and `kinds`, msgspec's types, by column; `record`,
    the type of a row as an object."""

    def __init__(self, inputs: ModelInputs, types: Mapping[str, str]) -> None:
        self.lists = frozenset(column for s in inputs.sequences for column in s.columns)
        ids = {c.name: KINDS[types[c.name]] for c in inputs.categories}
        both = dict.fromkeys(inputs.numbers, NUMBER) | ids | dict.fromkeys(self.lists, LIST)
        self.datatypes = {name: both[name][0] for name in inputs.columns}
        self.kinds: dict[str, Any] = {name: both[name][1] for name in inputs.columns}
        self.record: Any = TypedDict("Features", self.kinds)  # type: ignore[operator]
        self._records: Any = msgspec.json.Decoder(list[self.record])

    def from_records(self, data: msgspec.Raw) -> list[Values]:
        """A JSON array of objects."""
        return list(map(_picker(tuple(self.kinds)), self._records.decode(data)))

    def from_table(self, names: tuple[str, ...], data: msgspec.Raw) -> list[Values]:
        """A JSON array of arrays whose values stand in the order of `names`."""
        self._check(names)
        with _naming(names):
            rows: list[Values] = _table(self, names).decode(data)
        wanted = tuple(self.kinds)
        return rows if names == wanted else list(map(_picker(tuple(map(names.index, wanted))), rows))

    def from_columns(self, columns: Mapping[str, Sequence[Any]]) -> list[Values]:
        """A list of values by column."""
        self._check(columns)
        names = tuple(self.kinds)
        with _naming(names):
            return msgspec.convert(list(zip(*map(columns.__getitem__, names), strict=True)), _rows_type(self, names))

    def _check(self, names: Iterable[str]) -> None:
        if lacking := self.kinds.keys() - set(names):
            raise Refused(422, f"columns lack what the model reads: {', '.join(sorted(lacking)[:5])}")

    def metadata(self, name: str, versions: Sequence[str]) -> dict[str, Any]:
        """The model's metadata as v2 has it."""
        inputs = [{"name": n, "datatype": d, "shape": [-1]} for n, d in self.datatypes.items()]
        output = {"name": "score", "datatype": "FP32", "shape": [-1]}
        return {
            "name": name,
            "versions": list(versions),
            "platform": "onnxruntime_onnx",
            "inputs": inputs,
            "outputs": [output],
        }


class _Split(msgspec.Struct):
    columns: list[str]
    data: msgspec.Raw


class Invocation(msgspec.Struct):
    """The body of `/invocations`: one of these."""

    dataframe_split: _Split | UnsetType = UNSET
    dataframe_records: msgspec.Raw | UnsetType = UNSET
    instances: msgspec.Raw | UnsetType = UNSET
    inputs: dict[str, list[Any]] | UnsetType = UNSET


class Tensor(msgspec.Struct):
    """An input of a v2 request; `parameters.binary_data_size` bytes behind the JSON stand for `data`."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | UnsetType = UNSET


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class Inference(msgspec.Struct):
    """The JSON of a v2 request."""

    inputs: list[Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


_invocation, _inference = msgspec.json.Decoder(Invocation), msgspec.json.Decoder(Inference)


def _picker(keys: tuple[Any, ...]) -> Callable[[Any], Values]:
    """A function that gets these keys' values out of something."""
    return itemgetter(*keys) if len(keys) > 1 else lambda row: tuple(row[key] for key in keys)


def _rows_type(schema: Schema, names: tuple[str, ...]) -> Any:
    row = tuple[tuple(schema.kinds.get(name, Any) for name in names)]  # type: ignore[misc]
    return list[row]  # type: ignore[valid-type]


@lru_cache(maxsize=16)
def _table(schema: Schema, names: tuple[str, ...]) -> Any:
    return msgspec.json.Decoder(_rows_type(schema, names))


@contextmanager
def _naming(names: tuple[str, ...]) -> Iterator[None]:
    """An objection says where in the row it is: this adds in which column."""
    try:
        yield
    except msgspec.ValidationError as error:
        place = re.search(r"\$\[\d+\]\[(\d+)\]", str(error))
        raise Refused(422, f"{names[int(place[1])]}: {error}" if place else str(error)) from None


@lru_cache(maxsize=16)
def schema_of(inputs: ModelInputs, types: tuple[tuple[str, str], ...]) -> Schema:
    """The schema of a version's inputs."""
    return Schema(inputs, dict(types))


def mlflow_rows(body: bytes, schema: Schema) -> list[Values]:
    """The rows of an `/invocations` body; columns that the model doesn't read are passed over. Raises Refused."""
    with _refusing():
        asked = _invocation.decode(body)
        given = [
            v for v in (asked.dataframe_split, asked.dataframe_records, asked.instances, asked.inputs) if v is not UNSET
        ]
        if len(given) != 1:
            raise Refused(422, "send one of dataframe_split, dataframe_records, instances and inputs")
        (rows,) = given
        if isinstance(rows, msgspec.Raw):
            return _bounded(schema.from_records(rows))
        if isinstance(rows, _Split):
            return _bounded(schema.from_table(tuple(rows.columns), rows.data))
        return _bounded(schema.from_columns(rows))


def v2_rows(body: bytes, json_bytes: int | None, schema: Schema) -> tuple[list[Values], Inference]:
    """The rows of a v2 inference request, and its JSON; binary tensors follow the first `json_bytes` bytes."""
    with _refusing():
        asked = _inference.decode(body if json_bytes is None else body[:json_bytes])
        names = [tensor.name for tensor in asked.inputs]
        if set(names) != set(schema.datatypes) or len(names) != len(schema.datatypes):
            odd = sorted(set(names) ^ set(schema.datatypes)) or ["one name twice"]
            raise Refused(400, f"inputs must be the model's, each once; see its metadata: {', '.join(odd[:5])}")
        columns, at = {}, len(body) if json_bytes is None else json_bytes
        for tensor in asked.inputs:
            size = tensor.parameters.get("binary_data_size")
            values = _flat(tensor) if size is None else _binary(tensor, body[at : at + size])
            at += size or 0
            if math.prod(tensor.shape) != len(values) or math.prod(tensor.shape[1:]) != 1:
                raise Refused(400, f"input {tensor.name}: {len(values)} values are no tensor of shape [n] or [n, 1]")
            columns[tensor.name] = _plain(values, tensor.name in schema.lists)
        return _bounded(schema.from_columns(columns)), asked


def v2_reply(name: str, version: str, scores: Sequence[float], asked: Inference) -> tuple[bytes, dict[str, str]]:
    """The body of a v2 answer and its headers; the scores are binary where the request says so."""
    output: dict[str, Any] = {"name": "score", "datatype": "FP32", "shape": [len(scores)]}
    parameters = next((o.parameters for o in asked.outputs), {})
    binary = parameters.get("binary_data", asked.parameters.get("binary_data_output", False))
    tail = np.array(scores, "<f4").tobytes() if binary else b""
    output |= {"parameters": {"binary_data_size": len(tail)}} if binary else {"data": scores}
    body = {"model_name": name, "model_version": version, "outputs": [output]} | ({"id": asked.id} if asked.id else {})
    head = msgspec.json.encode(body)
    return head + tail, {"inference-header-content-length": str(len(head))} if binary else {}


class _refusing:
    """What a decoder or a conversion objects to, as Refused."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, msgspec.ValidationError):
            raise Refused(422, str(error)) from None
        if isinstance(error, msgspec.DecodeError | UnicodeDecodeError):
            raise Refused(400, f"the body is not valid JSON: {error}") from None
        if isinstance(error, RecursionError):
            raise Refused(400, "the body is nested too deeply") from None
        if isinstance(error, ValueError | TypeError | LookupError | OverflowError):
            raise Refused(422, f"columns and values don't fit together: {error}") from None


def _bounded(rows: list[Values]) -> list[Values]:
    if not 0 < len(rows) <= MAX_ROWS:
        raise Refused(413 if rows else 422, f"{len(rows)} rows: send 1 to 1,000")
    return rows


def _flat(tensor: Tensor) -> list[Any]:
    data = [] if tensor.data is UNSET else tensor.data
    return [v for values in data for v in values] if data and isinstance(data[0], list) else data


def _binary(tensor: Tensor, raw: bytes) -> list[Any]:
    if tensor.datatype != "BYTES":
        return list(np.frombuffer(raw, DTYPES[tensor.datatype]).tolist())
    texts, at = [], 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        texts.append(raw[at + 4 : end].decode())
        at = end
    return texts


def _plain(values: list[Any], lists: bool) -> list[Any]:
    """NaN as null, texts of lists as lists."""
    return [msgspec.json.decode(v) if lists else None if v != v else v for v in values]
