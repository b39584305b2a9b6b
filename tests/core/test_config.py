"""Configs go to JSON and back unchanged, and nothing in a config.json is dropped in silence."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from qlip.core.config import differences, from_json, to_json
from qlip.core.errors import UserError, nearest_name


@dataclass(kw_only=True, slots=True)
class Inner:
    rate: float = 1e-3
    rates: dict[str, float] = field(default_factory=lambda: {"a.b": 2.0})
    kind: Literal["x", "y"] = "x"


@dataclass(kw_only=True, slots=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    betas: tuple[float, float] = (0.9, 0.95)
    names: tuple[str, ...] = ("a",)
    limit: int | None = None


def test_json_round_trip_is_exact_and_plain():
    config = Outer(name="é", inner=Inner(rate=0.1 + 0.2, rates={"m.n": 3.0}, kind="y"), names=(), limit=3)
    text = json.dumps(to_json(config))
    again = from_json(Outer, json.loads(text))
    assert again == config
    assert isinstance(again.inner, Inner) and isinstance(again.betas, tuple) and isinstance(again.names, tuple)


def test_missing_fields_have_their_defaults():
    assert from_json(Outer, {"name": "n", "inner": {"kind": "y"}}) == Outer(name="n", inner=Inner(kind="y"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"name": "n", "nmae": 1}, "config field nmae is unknown"),
        ({"name": "n", "inner": {"raet": 1.0}}, "config field inner.raet is unknown"),
        ({"name": "n", "betas": [1.0, "x"]}, r"config field betas\.1: .*number"),
        ({"name": "n", "inner": {"kind": "z"}}, r"config field inner\.kind: .*'x' or 'y'"),
        ({}, "config field name: "),
    ],
)
def test_unknown_and_mistyped_fields_are_refused_by_name(values, named):
    with pytest.raises(UserError, match=named) as refused:
        from_json(Outer, values)
    assert "\n" not in str(refused.value)


def test_keys_of_a_table_are_the_users_own():
    assert from_json(Outer, {"name": "n", "inner": {"rates": {"any.thing": 1}}}).inner.rates == {"any.thing": 1.0}


def test_differences_name_every_leaf():
    old = {"a": 1, "b": {"c": [1, 2], "d": "x", "same": 0}, "gone": True}
    new = {"a": 2, "b": {"c": [1, 3], "d": "x", "same": 0}, "new": 1.5}
    assert differences(old, new) == ["a: 1 -> 2", "b.c: [1, 2] -> [1, 3]", "gone: True -> None", "new: None -> 1.5"]
    assert differences(old, old) == []


def test_nearest_name_suggests_or_lists():
    assert nearest_name("recontruction", ["zero_shot", "reconstruction"]) == "did you mean 'reconstruction'?"
    assert nearest_name("qqq", ["b", "a"]) == "known: a, b"
