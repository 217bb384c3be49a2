"""Hypothesis strategies for any declared type: valid instances, and near misses, each labelled with its fault.

A type whose fields must agree in meaning (not only in shape) registers its own strategy with `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st

from hal.contracts.inputs import PagedModelInput
from hal.features import FEATURES
from hal.features.declare import Batch
from hal.schema import Declared, Field
from hal.schema.examples import make_array
from hal.schema.layout import NP_DTYPES
from hal.schema.packed import as_tensor

T = TypeVar("T", bound=Declared)
_REGISTERED: dict[type[Declared], Callable[..., st.SearchStrategy[Any]]] = {}
_VOCAB = 1000  # token ids of batches
_TEXT = st.text(st.characters(min_codepoint=1, max_codepoint=0xD7FF), max_size=12)  # no NUL, no surrogate
_INT64 = st.integers(-(2**63), 2**63 - 1)
_SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "int": _INT64, "float": st.floats(allow_nan=False), "bool": st.booleans(), "str": _TEXT,
    "texts": st.lists(_TEXT, max_size=5).map(tuple),
}


def register(cls: type[T], make: Callable[..., st.SearchStrategy[T]]) -> None:
    """Use `make(cls, min_size, max_size)` for `instances` of cls and its subclasses: for types whose `check` relates
    fields to one another."""
    _REGISTERED[cls] = make


def instances(cls: type[T], *, min_size: int = 0, max_size: int = 6) -> st.SearchStrategy[T]:
    """Valid instances of `cls` on the host: every symbol in [min_size, max_size], optional fields present or absent."""
    make = next((_REGISTERED[base] for base in cls.__mro__ if base in _REGISTERED), _instances)
    return make(cls, min_size, max_size)


@st.composite
def _instances(draw: st.DrawFn, cls: Any, min_size: int, max_size: int) -> Any:
    schema = cls.schema
    dims = {s: draw(st.integers(min_size, max_size), label=s) for s in schema.symbols}
    # One seed for all contents, which shrinks and runs faster; values matter less than shapes.
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    values: dict[str, Any] = {}
    for f in schema.fields:
        if f.optional and draw(st.booleans(), label=f"no {f.name}"):
            values[f.name] = None
        else:
            values[f.name] = _array(f, dims, rng) if f.array else draw(_SCALARS[f.kind], label=f.name)
    return cls(**values)


def _array(f: Field, dims: dict[str, int], rng: np.random.Generator) -> Any:
    assert f.array is not None
    array = make_array(f.array, dims, rng)
    return as_tensor(array, f.array.dtype) if f.kind == "tensor" else array


@dataclass(frozen=True)
class NearMiss:
    """An instance with exactly one fault, the field at fault and the reason."""

    instance: Declared
    field: str
    why: str


@st.composite
def near_misses(draw: st.DrawFn, cls: type[Declared]) -> NearMiss:
    """Instances that differ from a valid one in one field: missing, or its dtype, rank, size, strides or value."""
    instance = draw(instances(cls, min_size=1))
    options: list[tuple[str, str, Any]] = []
    for f in cls.schema.fields:
        value = instance[f.name]
        if value is None:
            continue
        if f.array is None:
            options.append((f.name, "wrong type", object()))
        else:
            options += [(f.name, why, bad) for why, bad in _breakages(f, value, _constrained(f, instance))]
        if not f.optional:
            options.append((f.name, "missing", None))
    # Each kind of miss comes as often as the others, however many fields have it.
    kind = draw(st.sampled_from(sorted({why for _, why, _ in options})))
    field, why, bad = draw(st.sampled_from([o for o in options if o[1] == kind]))
    broken = cls.__new__(cls)
    broken.__dict__.update(instance.__dict__)
    broken.__dict__[field] = bad
    return NearMiss(broken, field, why)


def _constrained(f: Field, instance: Declared) -> bool:
    """Whether another size of the first dimension contradicts a constant, a factor, or another present field."""
    assert f.array is not None
    first = f.array.dims[0]
    others = (o for o in type(instance).schema.fields if o.array and o is not f and instance[o.name] is not None)
    shared = any(d.symbol == first.symbol for o in others if o.array for d in o.array.dims)
    return not first.symbol or first.scale > 1 or shared


def _breakages(f: Field, value: Any, constrained: bool) -> list[tuple[str, Any]]:
    assert f.array is not None
    tensor = f.kind == "tensor"
    other = "int8" if f.array.dtype == "int16" else "int16"
    found: list[tuple[str, Any]] = [("not an array", [1, 2, 3]), ("one dimension too many", value[None])]
    grown: Any
    doubled: Any
    if tensor:
        import torch

        found.append(("wrong dtype", value.to(getattr(torch, other))))
        found.append(("wrong device", value.to("meta")))
        grown = torch.cat([value, value[-1:]])
    else:
        found.append(("wrong dtype", value.view(np.uint8).astype(other)))
        grown = np.concatenate([value, value[-1:]])
    if constrained and value.shape[0]:
        found.append(("one row too many", grown))
    doubled = (torch.cat([value, value]) if tensor else np.concatenate([value, value]))[::2]
    if value.shape[0] > 1:
        found.append(("strided", doubled))
    for bound, step, why in ((f.array.low, -1, "below its minimum"), (f.array.high, 1, "above its maximum")):
        if bound is not None and 0 not in value.shape:
            outside: Any = value.clone() if tensor else value.copy()
            outside[(0,) * outside.ndim] = bound + step
            found.append((why, outside))
    return found


@st.composite
def _paged(draw: st.DrawFn, cls: type[PagedModelInput], min_size: int, max_size: int) -> Any:
    """A consistent batch: contexts of any length over shuffled blocks, decodes first, sampled in any way."""
    size = draw(st.sampled_from((1, 4, 16)), label="block_size")
    cached_and_query = st.tuples(st.integers(0, 40), st.integers(1, 12))
    lens = draw(st.lists(cached_and_query, min_size=min_size, max_size=max_size))
    lens.sort(key=lambda pair: pair[1] != 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    totals = [cached + query for cached, query in lens]
    needed = [-(-total // size) for total in totals]
    pool = rng.permutation(np.arange(1, sum(needed) + 4)).tolist()
    tables = np.zeros((len(lens), max(needed, default=0) + draw(st.integers(0, 2))), np.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = [pool.pop() for _ in range(count)]
    queries = np.array([query for _, query in lens], np.int64)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    spans = [np.arange(cached, cached + query) for cached, query in lens]
    positions = np.concatenate([np.zeros(0, np.int64), *spans])
    rows = np.repeat(np.arange(len(lens)), queries)
    slots = tables[rows, positions // size] * size + positions % size
    ids = rng.integers(0, _VOCAB, len(positions))
    sampled = np.flatnonzero(rng.random(len(lens)) < draw(st.sampled_from((0.0, 0.7, 1.0)), label="sampled"))
    targets = rng.permutation(len(positions))[:draw(st.sampled_from((0, 0, 3)), label="targets")]
    arrays = {"input_ids": ids, "positions": positions, "slot_mapping": slots, "query_start_loc": starts,
              "seq_lens": np.array(totals), "block_tables": tables,
              "logits_indices": np.concatenate([starts[sampled + 1] - 1, targets])}
    scalars = {"block_size": size, "num_decode_seqs": int((queries == 1).sum()), "num_samples": len(sampled),
               "max_query_len": int(queries.max(initial=0))}
    batch = Batch(queries.tolist(), rows, sampled.tolist(), [totals[i] for i in sampled], len(targets), _VOCAB)
    for feature in FEATURES:
        if draw(st.booleans(), label=type(feature).__name__):
            for name, value in feature.example(draw, rng, batch).items():
                if isinstance(value, int):
                    scalars[name] = value
                else:
                    arrays[name] = value
    if draw(st.booleans(), label="states"):
        arrays["state_rows"] = rng.permutation(len(lens))
    fields = {name: _as(cls, name, array) for name, array in arrays.items()}
    make: Any = cls  # mypy: each name's type is not known here
    return make(**fields, **scalars, **_further(draw, cls, fields, rng))


def _further(draw: st.DrawFn, cls: type[PagedModelInput], known: dict[str, Any], rng: np.random.Generator,
             ) -> dict[str, Any]:
    """Values of the fields that a subclass adds, of the sizes that the batch's own fields have."""
    dims = {d.symbol: size - d.offset for name, tensor in known.items() if (f := cls.schema.by_name[name]).array
            for d, size in zip(f.array.dims, tensor.shape, strict=True) if d.symbol}
    values = {}
    for f in cls.schema.fields:
        if f.name not in PagedModelInput.schema.by_name and not (f.optional and draw(st.booleans())):
            sizes = {s: dims.get(s, 0) for s in cls.schema.symbols}
            values[f.name] = _array(f, sizes, rng) if f.array else draw(_SCALARS[f.kind], label=f.name)
    return values


def _as(cls: type[PagedModelInput], name: str, array: np.ndarray) -> Any:
    """A tensor in the dtype that the field declares."""
    declared = cls.schema.by_name[name].array
    assert declared is not None
    return as_tensor(np.ascontiguousarray(array, NP_DTYPES[declared.dtype]), declared.dtype)


register(PagedModelInput, _paged)
