"""Public parameters of a request: declared by annotation, checked at construction. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import dataclass_transform

from hal.errors import RequestError, SchemaError
from hal.values import described, is_array, plain

_LARGEST = 3.4e38  # what float32 holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """The facts about a public parameter that its type and its default do not tell.

    Attributes:
        help: one line, for the command line and the documentation.
        low, high: inclusive bounds of a number, or of each number in a list; `above` excludes `low` itself.
        unset: the meaning of None, for the documentation.
        most: the largest number of entries of a list or a mapping. longest: the largest number of characters of a text.
        json: a text may also be given as a mapping, of which it is the JSON.
        column: the dtype in which a step carries the parameter, or None for a parameter that the engine alone reads.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: bool = False
    unset: str | None = None
    most: int | None = None
    longest: int | None = None
    json: bool = False
    column: str | None = None


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Params:
    """A group of parameters. A subclass becomes a frozen keyword-only dataclass, each field of which is annotated
    `Annotated[type, Param(...)]`. The type is int, float, bool, str, tuple[str, ...], tuple[int, ...] or
    tuple[tuple[int, float], ...] (numbers by token id, given as a mapping or as pairs), or one of these with None.

    Numbers may also be given as scalars of numpy or torch, and lists as arrays. All are kept as plain Python values.

    Raises:
        SchemaError: at class definition, when an annotation cannot be a parameter.
        RequestError: at construction, when a value does not fit its parameter. The error names the parameter.
    """

    _plan: ClassVar[Mapping[str, tuple[Any, bool, Param]]] = {}  # by name: the type, whether None is legal, the Param

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        hints = typing.get_type_hints(cls, include_extras=True)
        cls._plan = {f.name: _parse(cls.__name__, f.name, hints[f.name])
                     for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for name, (kind, optional, param) in self._plan.items():
            value = getattr(self, name)
            if value is not None or not optional:
                checked = _CHECKS[kind](name, value, param)
                if checked is not value:
                    object.__setattr__(self, name, checked)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The parameters, in the order of their declaration."""
        return tuple(cls._plan)

    @classmethod
    def param(cls, name: str) -> Param:
        """The declaration of a parameter."""
        return cls._plan[name][2]

    @classmethod
    def kind(cls, name: str) -> tuple[Any, bool]:
        """The type of a parameter without None, and whether None is legal."""
        return cls._plan[name][:2]


def _parse(owner: str, name: str, hint: Any) -> tuple[Any, bool, Param]:
    kind, *extras = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    param = next((e for e in extras if isinstance(e, Param)), None)
    optional = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    if optional:
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if param is None or kind not in _CHECKS:
        raise SchemaError(f"{owner}.{name} cannot be a parameter", got=hint,
                          expected="Annotated[TYPE, Param(...)] with TYPE one of " + ", ".join(map(_name, _CHECKS)))
    return kind, optional, param


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)


def _refuse(name: str, value: object, expected: str) -> RequestError:
    return RequestError(f"{name} is not usable", got=described(value), expected=expected, param=name)


def _integer(name: str, given: object, param: Param) -> int:
    low, high = param.low, param.high
    value: Any = plain(given)
    good = isinstance(value, int) and not isinstance(value, bool)
    if not good or (low is not None and value < low) or (high is not None and value > high):
        raise _refuse(name, given, f"an integer from {low} to {high}")
    return int(value)


def _number(name: str, given: object, param: Param) -> float:
    value: Any = plain(given)
    low, high = -math.inf if param.low is None else param.low, math.inf if param.high is None else param.high
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if not good or not low <= value <= high or (param.above and value == low):
        span = f"a finite number {'above' if param.above else 'of at least'} {low:g}" if low > -math.inf else "finite"
        raise _refuse(name, given, span + (f", at most {high:g}" if high < math.inf else ""))
    return float(value)


def _flag(name: str, given: object, param: Param) -> bool:
    value: Any = plain(given)
    if not isinstance(value, bool):
        raise _refuse(name, given, "true or false")
    return value


def _items(name: str, given: object) -> tuple[Any, ...]:
    """The value of a parameter that takes one item or several."""
    value: Any = plain(given)
    if isinstance(value, (str, int)):
        return (value,)
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(value)
    if is_array(value) and value.ndim == 1:
        return tuple(value.tolist())
    raise _refuse(name, given, "one, or a list")


def _check_most(name: str, items: Sized, param: Param) -> None:
    if param.most is not None and len(items) > param.most:
        raise RequestError(f"{name} has too many entries", got=len(items), expected=f"at most {param.most}",
                           param=name)


def _text(name: str, value: Any, param: Param) -> str:
    text = plain(value)
    if param.json and isinstance(text, Mapping):
        try:
            text = json.dumps(text, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise _refuse(name, value, "an object that JSON can hold") from None
    if not isinstance(text, str) or not text:
        raise _refuse(name, value, "a text that is not empty" + (", or a mapping" if param.json else ""))
    if param.longest is not None and len(text) > param.longest:
        raise RequestError(f"{name} is too long", got=f"{len(text)} characters", expected=f"at most {param.longest}",
                           param=name)
    return text


def _texts(name: str, value: Any, param: Param) -> tuple[str, ...]:
    items: tuple[Any, ...] = tuple(plain(item) for item in _items(name, value))
    if not all(isinstance(s, str) and s for s in items):
        raise RequestError(f"{name} holds something that is not a text", got=described(items),
                           expected="non-empty str", param=name)
    _check_most(name, items, param)
    longest = max(map(len, items), default=0)
    if param.longest is not None and longest > param.longest:
        raise RequestError(f"a text of {name} is too long", got=f"{longest} characters",
                           expected=f"at most {param.longest}", param=name)
    return items


def _integers(name: str, value: Any, param: Param) -> tuple[int, ...]:
    return tuple(_integer(name, item, param) for item in _items(name, value))


def _weights(name: str, value: Any, param: Param) -> tuple[tuple[int, float], ...]:
    try:
        pairs = dict(value).items()
    except (TypeError, ValueError):
        raise _refuse(name, value, "a mapping from token ids to numbers") from None
    token = Param(help="", low=0, high=2**31 - 1)
    _check_most(name, pairs, param)
    found: dict[int, float] = {}
    for key, number in pairs:
        if isinstance(key, str) and key.isascii() and key.isdigit():  # as JSON has it
            key = int(key)
        found[_integer(name, key, token)] = _number(name, number, param)
    return tuple(found.items())


_CHECKS: dict[Any, Callable[[str, Any, Param], Any]] = {
    int: _integer, float: _number, bool: _flag, str: _text, tuple[str, ...]: _texts, tuple[int, ...]: _integers,
    tuple[tuple[int, float], ...]: _weights}
