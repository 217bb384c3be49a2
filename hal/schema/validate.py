"""Structural validation, on every step: a fast pass that only compares, and a slow one that finds the wrong field."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from hal.errors import InputError
from hal.schema.fields import Dim, Field
from hal.schema.layout import NP_DTYPES

_SHAPES_KEPT = 4096
_PYTHON = {"int": int, "float": float, "bool": bool, "str": str, "texts": tuple}


def _plan(schema: Any) -> list[tuple[Any, ...]]:
    plan: list[tuple[Any, ...]] = []
    for f in schema.fields:
        if f.array is not None:
            dtype: Any = NP_DTYPES[f.array.dtype]
            if f.kind == "tensor":
                import torch

                dtype = getattr(torch, f.array.dtype)
            plan.append((f.name, dtype, f.array.dims))
    return plan


def validate(instance: Any, device: Any = None) -> None:
    """See `Declared.validate`."""
    schema = type(instance).schema
    if schema._plan is None:
        schema._plan = _plan(schema)
    state = instance.__dict__
    tensors = schema.kind == "tensor"
    if tensors and device is not None and type(device) is str:
        import torch

        device = torch.device(device)
    shapes: list[Any] = []
    try:
        for name, dtype, _ in schema._plan:
            value = state[name]
            if value is None:
                if not schema.by_name[name].optional:
                    break
                shapes.append(None)
                continue
            if value.dtype != dtype:
                break
            if tensors:
                if not value.is_contiguous() or (device is not None and value.device != device):
                    break
            elif not value.flags.c_contiguous:
                break
            shapes.append(value.shape)
        else:
            if _agree(schema, tuple(shapes)):
                for f in schema.unshaped:
                    if not _scalar_ok(f, state[f.name]):
                        break
                else:
                    return
    except (AttributeError, TypeError, KeyError):
        pass
    _blame(instance, device)


def _agree(schema: Any, shapes: tuple[Any, ...]) -> bool:
    """Whether ranks are right and each symbol has one size. Steps repeat: what was found right is kept."""
    if shapes in schema._shapes:
        return True
    sizes: dict[str, int] = {}
    for (_, _, dims), shape in zip(schema._plan, shapes, strict=True):
        if shape is not None:
            if len(shape) != len(dims):
                return False
            for d, size in zip(dims, shape, strict=True):
                if not _fits(d, size):
                    return False
                if d.symbol and sizes.setdefault(d.symbol, (size - d.offset) // d.scale) * d.scale + d.offset != size:
                    return False
    if len(schema._shapes) >= _SHAPES_KEPT:
        schema._shapes.clear()
    schema._shapes.add(shapes)
    return True


def _scalar_ok(field: Field, value: Any) -> bool:
    if value is None:
        return field.optional
    return type(value) is _PYTHON[field.kind]


def _fail(name: str, field: str, got: object, expected: object) -> None:
    raise InputError(f"{name}.{field} breaks its declaration", got=got, expected=expected, fields=(field,),
                     hint="see the type's documentation table (`hal.schema` markdown)")


def _blame(instance: Any, device: Any) -> None:
    schema = type(instance).schema
    name, state = schema.name, instance.__dict__
    votes: dict[str, list[tuple[str, int]]] = {s: [] for s in schema.symbols}
    for f in schema.fields:
        value = state.get(f.name)
        if f.array is None:
            if not _scalar_ok(f, value):
                _fail(name, f.name, repr(value), f.kind)
            continue
        if value is None:
            if not f.optional:
                _fail(name, f.name, None, f"{f.array.dtype}{f.array.shape_text}")
            continue
        _blame_array(name, f, value, device)
        for d, size in zip(f.array.dims, value.shape, strict=True):
            if d.symbol:
                votes[d.symbol].append((f.name, (size - d.offset) // d.scale))
    for symbol, cast in votes.items():
        counts = Counter(size for _, size in cast).most_common()
        if len(counts) > 1:
            majority, n = counts[0]
            # Without a majority nobody knows which field is wrong, so every field with the symbol is named.
            tie = counts[1][1] == n
            odd = tuple(dict.fromkeys(f for f, size in cast if tie or size != majority))
            raise InputError(f"{name}: fields disagree about {symbol!r}", got=", ".join(f"{f}: {s}" for f, s in cast),
                             expected="one size" if tie else majority, fields=odd)


def _blame_array(name: str, f: Field, value: Any, device: Any) -> None:
    assert f.array is not None
    wanted: Any = NP_DTYPES[f.array.dtype]
    if f.kind == "tensor":
        import torch

        if not isinstance(value, torch.Tensor):
            _fail(name, f.name, type(value).__name__, "torch.Tensor")
        wanted = getattr(torch, f.array.dtype)
    elif not isinstance(value, np.ndarray):
        _fail(name, f.name, type(value).__name__, "numpy.ndarray")
    if value.dtype != wanted:
        _fail(name, f.name, value.dtype, wanted)
    if len(value.shape) != len(f.array.dims):
        _fail(name, f.name, f"shape {list(value.shape)}", f.array.shape_text)
    for d, size in zip(f.array.dims, value.shape, strict=True):
        if not _fits(d, size):
            _fail(name, f.name, f"shape {list(value.shape)}", f.array.shape_text)
    contiguous = value.is_contiguous() if f.kind == "tensor" else value.flags.c_contiguous
    if not contiguous:
        _fail(name, f.name, "strided", "contiguous")
    if f.kind == "tensor" and device is not None and value.device != device:
        _fail(name, f.name, value.device, device)


def _fits(dim: Dim, size: int) -> bool:
    if not dim.symbol:
        return size == dim.offset
    return size >= dim.offset and (size - dim.offset) % dim.scale == 0


def check_bounds(instance: Any) -> None:
    """Every value of a field lies within its declared `low` and `high` (NaN does not), and a bool is 0 or 1.

    Raises:
        InputError: naming the first field that has another value.
    """
    schema = type(instance).schema
    for f in schema.fields:
        value = instance.__dict__[f.name]
        if f.array is None or value is None or 0 in value.shape:
            continue
        low, high = f.array.low, f.array.high
        if low is not None and not bool((value >= low).all()):
            _fail(schema.name, f.name, f"minimum {value.min()}", f">= {low}")
        if high is not None and not bool((value <= high).all()):
            _fail(schema.name, f.name, f"maximum {value.max()}", f"<= {high}")
        if f.array.dtype == "bool":
            held = _bytes_of(value)
            if bool((held > 1).any()):
                _fail(schema.name, f.name, f"a byte of {held.max()}", "0 or 1")


def _bytes_of(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.view(np.uint8)
    import torch

    return value.view(torch.uint8)
