"""Conversion of callers' values to plain Python values: scalars and arrays of numpy and torch. This module loads
neither library."""

from __future__ import annotations

import importlib
import operator
import reprlib
import sys
from operator import attrgetter
from typing import Any, Protocol, SupportsIndex, TypeGuard

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def imported(name: str) -> Any:
    """The object that "module:attribute" names. Raises ImportError, AttributeError, ValueError."""
    module, _, attribute = name.partition(":")
    return attrgetter(attribute)(importlib.import_module(module))


def origin(name: str) -> str:
    """Where the module of "module:attribute" came from, and what to do if it is another one than was meant. Empty if it
    was not imported."""
    module = name.partition(":")[0]
    found = sys.modules.get(module) or sys.modules.get(module.partition(".")[0])
    if found is None:
        return ""
    if (file := getattr(found, "__file__", None)) is not None:
        return f"{found.__name__} was imported from {file}: if another module is meant, rename one of the two"
    folder = next(iter(getattr(found, "__path__", ())), "no file")
    return (f"{found.__name__} was imported from the folder {folder}, which has no __init__.py: it may hide an "
            "installed package of this name. Run in another folder, or rename it")


class ArrayLike(Protocol):
    """An array, tensor or scalar of numpy, torch or a library like them."""

    @property
    def ndim(self) -> int: ...
    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    def item(self) -> Any: ...
    def tolist(self) -> Any: ...


def plain(value: object) -> object:
    """An integer, float or boolean of numpy, torch or Python as Python's own; any other value as it is."""
    if value is None or type(value) in (int, float, bool, str, tuple, list, dict):
        return value
    if isinstance(value, str):
        return str(value)
    if is_array(value):
        try:
            item: object = value.item() if value.ndim == 0 else value
            return item
        except (RuntimeError, NotImplementedError):  # a tensor without data
            return value
    return operator.index(value) if isinstance(value, SupportsIndex) else value


def is_array(value: object) -> TypeGuard[ArrayLike]:
    """Judged by the methods, not by the class."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("ndim", "dtype", "item", "tolist"))


def described(value: object) -> str:
    """A value for an error message: its beginning, and its type unless the value shows it."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # an integer of more digits than Python converts, or an object's own __repr__
        text = "a value without a text"
    if value is None or type(value) in (bool, int, float, str):
        return text
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if is_array(value):
        return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{kind}: {text}"
