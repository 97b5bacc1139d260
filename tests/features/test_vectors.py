"""The vector of a request, and the arrays a model reads."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from features.errors import ConfigError
from features.inputs import encode
from features.usecase import Category, ModelInputs
from features.vectors import Vectorizer, empty_row, join_keys, schema_id, view_columns
from tests.toy import all_orders, dearness, shop_item, use_case

T = 1_767_225_600_000
HOUR = 3_600_000


def assemble(rows: dict[str, Any], event_time: int = T) -> Any:
    return Vectorizer(use_case).assemble({"shop": "a", "item": 1}, {"price": 5.0}, event_time, rows)


def test_columns_name_type_and_function() -> None:
    assert view_columns(all_orders) == (("all_count", "INT64", "count"), ("all_mean", "DOUBLE", "mean"))
    assert (join_keys(all_orders), join_keys(shop_item)) == ((), ("shop", "item"))


def test_an_empty_window_is_zero_a_list_or_null() -> None:
    assert empty_row(shop_item) == {
        "si_count": 0, "si_sum": 0.0, "si_last": None, "si_last_3": [], "si_who": None, "si_whos": []
    }  # fmt: skip


def test_the_vector_holds_everything_in_the_order_of_its_types() -> None:
    vector = assemble({"all_orders": ({"all_count": 2, "all_mean": 4.0}, T - 1), "shop_item": (None, None)})
    assert list(vector.features) == list(Vectorizer(use_case).types)
    assert vector.features["shop"] == "a"
    assert vector.features["price"] == 5.0
    assert vector.features["due"] is None
    assert vector.features["price_ratio"] == 1.25
    assert vector.feature_times == {"all_orders": T - 1, "shop_item": None}
    assert (vector.missing, vector.stale) == (["shop_item"], [])


def test_a_row_past_its_ttl_reads_as_empty_and_is_missing_and_stale() -> None:
    row = {**empty_row(shop_item), "si_count": 7}
    at_ttl, past = (assemble({"shop_item": (row, T - 2 * HOUR)}), assemble({"shop_item": (row, T - 2 * HOUR - 1)}))
    assert (at_ttl.features["si_count"], at_ttl.stale) == (7, [])
    assert (past.features["si_count"], past.stale) == (0, ["shop_item"])
    assert past.missing == ["all_orders", "shop_item"]
    assert past.feature_times["shop_item"] == T - 2 * HOUR - 1


def test_a_ttl_of_zero_never_ends() -> None:
    assert assemble({"all_orders": ({"all_count": 1, "all_mean": 1.0}, 0)}).stale == []


def test_on_demand_features_use_the_moment_of_asking() -> None:
    assert [assemble({}, T + h * HOUR).features["hour"] for h in (0, 5)] == [0, 5]


def test_derived_keys_join_the_given_ones() -> None:
    derived = replace(use_case, derive=lambda row: {"item": row["price"] * 2, "shop": row["shop"] + "!"})
    keys = Vectorizer(derived).entity_keys({"shop": "a"}, {"price": 2})
    assert keys == {"shop": "a!", "item": 4}


def test_the_schema_id_follows_names_and_types() -> None:
    assert schema_id(use_case) == schema_id(replace(use_case, prior=0.5))
    assert schema_id(use_case) != schema_id(replace(use_case, on_demand=()))
    assert schema_id(use_case) != schema_id(replace(use_case, views=(all_orders,)))


def test_encode_numbers_nulls_and_booleans() -> None:
    inputs = ModelInputs(("a", "b", "c"))
    found = encode(inputs, [{"a": 1, "b": None, "c": True}, {"a": 0.1, "c": False}])
    assert (found.numbers.dtype, found.numbers.shape, found.ids.dtype, found.ids.shape) == (
        np.float32,
        (2, 3),
        np.int64,
        (2, 0),
    )
    np.testing.assert_array_equal(found.numbers, np.array([[1, np.nan, 1], [0.1, np.nan, 0]], np.float32))
    assert encode(inputs, []).numbers.shape == (0, 3)


def test_ids_are_hashed_with_their_name_and_type() -> None:
    inputs = ModelInputs((), (Category("x", 1000, 2), Category("y", 1000, 2)))
    ids = encode(inputs, [{"x": 1, "y": 1}, {"x": 1.0, "y": None}, {"x": True, "y": "é"}]).ids
    texts = [["x=1", "y=1"], ["x=1.0", "y=None"], ["x=True", "y=é"]]
    assert ids.tolist() == [[zlib.crc32(t.encode()) % 1000 for t in row] for row in texts]


def test_a_vector_read_back_from_json_is_encoded_the_same() -> None:
    vector = assemble({"all_orders": ({"all_count": 3, "all_mean": 1 / 3}, T)}).features
    here, there = (encode(use_case.inputs, [v]) for v in (vector, json.loads(json.dumps(vector))))
    np.testing.assert_array_equal(here.numbers, there.numbers)
    np.testing.assert_array_equal(here.ids, there.ids)


@pytest.mark.parametrize("inputs", [ModelInputs(("nope",)), ModelInputs((), (Category("nope", 2, 2),))])
def test_inputs_that_the_vector_lacks_are_refused(inputs: ModelInputs) -> None:
    with pytest.raises(ConfigError, match="nope"):
        Vectorizer(use_case).check(inputs)


def test_a_list_is_no_single_value() -> None:
    with pytest.raises(ConfigError, match="si_last_3 are lists"):
        Vectorizer(use_case).check(ModelInputs(("si_last_3",)))
    Vectorizer(use_case).check(use_case.inputs)


def test_the_on_demand_function_is_the_declared_one() -> None:
    assert Vectorizer(use_case)._on_demand == [dearness.feature_transformation.udf]
