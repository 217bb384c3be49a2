"""Reading of JSON into a dataclass. Every value must have exactly the type that its field declares."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Any, TypeVar

from hal.errors import WireError

T = TypeVar("T")


def typed(kind: type[T], data: object, where: str) -> T:
    """An instance of the dataclass `kind` from a JSON object. Fields that the object lacks have their defaults.

    Raises:
        WireError: a value has another type, is not finite, is missing, or has no field. The error names it.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(data, dict) or not data.keys() <= hints.keys():
        raise _wrong(where, data, f"an object with the fields {', '.join(hints)}")
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)  # type: ignore[arg-type]
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in data]
    if missing:
        raise _wrong(where, "nothing", f"a value of {', '.join(missing)}")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _value(hint: Any, value: object, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _value(next(a for a in args if a is not types.NoneType), value, where)
    if origin is typing.Literal:
        if type(value) is str and value in args:
            return value
        raise _wrong(where, value, " or ".join(args))
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_value(args[0], v, where) for v in value)
        raise _wrong(where, value, "a list")
    if origin is dict and type(value) is dict:
        return value
    if dataclasses.is_dataclass(hint):
        return typed(typing.cast("type[Any]", hint), value, where)
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    if hint is not float and type(value) is hint:
        return value
    raise _wrong(where, value, hint.__name__ if hint is not float else "a finite number")


def _wrong(where: str, got: object, expected: str) -> WireError:
    return WireError(f"the recording's {where} is not usable", got=repr(got)[:100], expected=expected)
