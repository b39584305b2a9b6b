"""Configs as dataclasses: strict JSON out and in, and what differs between two of them."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import pydantic

from qlip.core.errors import UserError

T = TypeVar("T")


@cache
def _adapter(cls: Any) -> pydantic.TypeAdapter:
    """Making one costs milliseconds."""
    return pydantic.TypeAdapter(cls)


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass, with its nested ones, as plain JSON values."""
    return _adapter(type(config)).dump_python(config, mode="json")  # type: ignore[arg-type]  # types hash


def from_json(cls: type[T], values: dict[str, Any]) -> T:
    """The dataclass of plain JSON values. Raises `UserError` naming the first unknown or mistyped field."""
    try:
        config = _adapter(cls).validate_python(values)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"config field {'.'.join(map(str, first['loc']))}: {first['msg']}; mend config.json") from None
    _refuse_unknown_fields(values, to_json(config), path="")
    return config


def _refuse_unknown_fields(values: dict[str, Any], known: dict[str, Any], *, path: str) -> None:
    """Pydantic drops unknown fields of dataclasses silently, at every depth."""
    for name, value in values.items():
        if name not in known:
            raise UserError(f"config field {path}{name} is unknown: written by another version of qlip?")
        if isinstance(value, dict) and isinstance(known[name], dict):
            _refuse_unknown_fields(value, known[name], path=f"{path}{name}.")


def differences(old: dict[str, Any], new: dict[str, Any], *, path: str = "") -> list[str]:
    """Lines `a.b: 1 -> 2` for every leaf that differs between two nested JSON values."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, path=f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines
