"""What a use case may declare, checked before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from features.clicks import use_case as clicks
from features.contracts import Field
from features.errors import ConfigError
from features.usecase import UseCase
from tests.toy import use_case as toy


def test_an_event_its_request_and_its_key_meet_in_one_partition() -> None:
    row = {"user": "u1", "section": "sport"}
    assert clicks.partition_of(row) == clicks.partition("u1")
    assert {clicks.partition(f"u{i}") for i in range(100)} == {0, 1, 2, 3}
    assert replace(clicks, partitions=8).partition("123456789") == 0xCBF43926 % 8  # its check value
    assert toy.partition_of({"shop": "s"}) == 0


def optional_user(use_case: UseCase) -> dict[str, Any]:
    fields = tuple(replace(f, optional=True) if f.name == "user" else f for f in use_case.request.fields)
    return {"request": replace(use_case.request, fields=fields)}


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        (clicks, {"partition_key": None}, "need a partition_key"),
        (clicks, {"partition_key": "position"}, "required field of clicked"),
        (clicks, optional_user(clicks), "required field of requests"),
        (clicks, {"partition_key": "section"}, "user_shown, user_clicked"),
        (clicks, {"partitions": 0}, "1 or more"),
        (toy, {"partitions": 2, "partition_key": "id"}, "required field of requests"),
        (toy, {"prior": 1.0}, "prior"),
    ],
)
def test_what_cannot_work_is_refused(case: UseCase, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(case, **changes).check()


def test_a_global_view_needs_one_partition() -> None:
    shop = Field("shop", str)
    contracts = tuple(replace(c, fields=(*[f for f in c.fields if f.name != "shop"], shop)) for c in toy.contracts)
    with pytest.raises(ConfigError, match="all_orders; give them the entity 'shop'"):
        replace(toy, contracts=contracts, partition_key="shop", partitions=2).check()
