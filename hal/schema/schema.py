"""A schema: what is derived from one class's declaration: layout, codec, documentation."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter, mul
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from hal.errors import InputError, SchemaError, WireError
from hal.schema.fields import Field
from hal.schema.layout import (
    HEAD_SIZE,
    MOST,
    Layout,
    align,
    aligned_bytes,
    place,
    read_head,
    symbols_of,
    write_head,
)
from hal.schema.packed import Packed, host_view

if TYPE_CHECKING:
    from hal.schema.declared import Declared

T = TypeVar("T", bound="Declared")
_CODES = {"int": "q", "float": "d", "bool": "?"}
_LAYOUTS_KEPT = 4096


class Schema(Generic[T]):
    """Attributes: cls, name, fields (as declared), symbols (in order of first use), fingerprint (64 bits)."""

    def __init__(self, cls: type[T], fields: tuple[Field, ...], defaults: Mapping[str, Any]) -> None:
        self.cls, self.name, self.fields = cls, cls.__name__, fields
        self.defaults = {f.name: defaults[f.name] for f in fields if not f.array and f.name in defaults}
        self.by_name = {f.name: f for f in fields}
        self.values_of = _values_of(tuple(self.by_name))
        arrays = [f for f in fields if f.array]
        self.kind = arrays[0].kind if arrays else "ndarray"
        if any(f.kind != self.kind for f in arrays):
            raise SchemaError(f"{self.name} mixes torch.Tensor and numpy.ndarray fields", expected="one of the two")
        self.symbols = tuple(dict.fromkeys(d.symbol for f in arrays if f.array for d in f.array.dims if d.symbol))
        self.symbol_set = frozenset(self.symbols)
        self.replicated = tuple(f for f in arrays if f.scope == "replicated")
        self.local = tuple(f for f in arrays if f.scope != "replicated")
        self.unshaped = tuple(f for f in fields if not f.array)
        self.scalars = tuple(f for f in fields if f.kind in _CODES and f.scope == "replicated")
        self.texts = tuple(f for f in fields if f.kind in ("str", "texts") and f.scope == "replicated")
        travelling = (*self.replicated, *self.scalars, *self.texts)
        # Bits for every field that may be absent. Local arrays have one too, which never travels.
        self.bits = {f.name: 1 << i for i, f in enumerate(f for f in (*travelling, *self.local) if f.optional)}
        if len(self.bits) > 64:
            raise SchemaError(f"{self.name} has {len(self.bits)} optional fields", expected="at most 64")
        self.message_bits = sum(self.bits.get(f.name, 0) for f in travelling)
        self.value_names = tuple(f.name for f in (*self.scalars, *self.texts))
        index = {s: i for i, s in enumerate(self.symbols)}
        # What packing looks up for each array: name, presence bit, dtype, and which symbol each axis gives.
        self._pack_plan = [
            (f.name, self.bits.get(f.name, 0), f.array.dtype,
             tuple((index[d.symbol], d.scale, d.offset, axis) for axis, d in enumerate(f.array.dims) if d.symbol))
            for f in (*self.replicated, *self.local) if f.array]
        self.head = struct.Struct("<" + "Q" * len(self.symbols) + "".join(_CODES[f.kind] for f in self.scalars))
        scalar_at = HEAD_SIZE + 8 * len(self.symbols)
        self._bools_at: list[tuple[str, int]] = []  # where a byte other than 0 and 1 may stand
        for f in self.scalars:
            if f.kind == "bool":
                self._bools_at.append((f.name, scalar_at))
            scalar_at += 1 if f.kind == "bool" else 8
        self.arrays_at = align(HEAD_SIZE + self.head.size)
        text = self.name + "\n" + "\n".join(f.describe for f in travelling)
        self.fingerprint = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        self._layouts: dict[tuple[int, ...], Layout] = {}
        # By presence bits: arrays that travel, local arrays, and of each symbol whether either or the former have it.
        self._present: dict[int, tuple[list[Field], list[Field], list[bool], list[bool]]] = {}
        self._plan: list[tuple[Any, ...]] | None = None
        self._shapes: set[tuple[Any, ...]] = set()  # of instances that were found to agree with the declaration

    def layout(self, sizes: tuple[int, ...], present: int) -> Layout:
        """The layout for symbol sizes (ordered as `symbols`) and presence bits; kept, since decode steps repeat."""
        key = (present, *sizes)
        return self._layouts.get(key) or self._keep(key, self._place(key))

    def _place(self, key: tuple[int, ...]) -> Layout:
        present, *sizes = key
        fields = self._present.get(present)
        if fields is None:
            here = [f for f in self.replicated if not f.optional or present & self.bits[f.name]]
            local = [f for f in self.local if present & self.bits[f.name]]
            known, travel = symbols_of([*here, *local]), symbols_of(here)
            if len(self._present) >= _LAYOUTS_KEPT:
                self._present.clear()
            fields = here, local, [s in known for s in self.symbols], [s in travel for s in self.symbols]
            self._present[present] = fields
        here, local, known_ones, travelling = fields
        dims = dict(zip(self.symbols, map(mul, sizes, known_ones), strict=True))
        views, end = place(here, self.arrays_at, dims)
        local_views, local_end = place(local, 0, dims) if local else ((), 0)
        wire_key = present & self.message_bits, *map(mul, sizes, travelling)
        return Layout(views, local_views, wire_key, dims, end, local_end)

    def _keep(self, key: tuple[int, ...], layout: Layout) -> Layout:
        if len(self._layouts) >= _LAYOUTS_KEPT:
            self._layouts.clear()
        self._layouts[key] = layout
        return layout

    def _arrived(self, key: tuple[int, ...]) -> Layout:
        """The layout of a message that gives these presence bits and symbol sizes. Nothing is allocated by them.

        Raises:
            WireError: it gives a bit that no field has, the size of a symbol that none of its arrays has, or a size
                that no array can have.
        """
        try:
            layout = self._place(key)
        except InputError as error:
            raise WireError(f"the dimensions of a {self.name} message are out of range: {error}") from None
        if layout.key != key:
            raise WireError(f"a {self.name} message describes fields that it does not have",
                            got=f"presence bits and symbol sizes {key}", expected=layout.key)
        if max(key[1:], default=0) > MOST:
            raise WireError(f"the dimensions of a {self.name} message are out of range", got=layout.dims,
                            expected=f"at most {MOST} each")
        return self._keep(key, layout)

    def allocate(self, dims: Mapping[str, int], present: Iterable[str] = (), **values: Any) -> Packed[T]:
        """A packed instance whose arrays are uninitialised views, to be filled in place.

        Args:
            dims: the size of each symbol; a symbol that is left out is 0.
            present: the optional arrays that exist.
            values: scalar and text fields; those with a default, and optional ones, may be left out.

        Raises:
            SchemaError: an unknown symbol or field, or a required value left out.
            InputError: a text that cannot travel (it contains NUL or half of a surrogate pair).
        """
        bits = 0
        for name in present:
            if name not in self.bits:
                raise SchemaError(f"{self.name} has no optional array {name!r}", expected=", ".join(self.bits))
            bits |= self.bits[name]
        if not (dims.keys() <= self.symbol_set and values.keys() <= self.by_name.keys()):
            unknown = sorted((dims.keys() - self.symbol_set) | (values.keys() - self.by_name.keys()))
            raise SchemaError(f"{self.name} declares no symbol or field {', '.join(unknown)}")
        values = {**self.defaults, **values}
        for f in self.scalars:
            if not f.optional and values.get(f.name) is None:
                raise SchemaError(f"{self.name}.{f.name} is required")
        return self._build(tuple([dims.get(s, 0) for s in self.symbols]), bits, values)

    def _build(self, sizes: tuple[int, ...], bits: int, values: dict[str, Any]) -> Packed[T]:
        """`allocate` for arguments known to be right."""
        scalars: list[int | float] = []
        for f in self.scalars:
            value = values.get(f.name)
            scalars.append(0 if value is None else value)
            if f.optional and value is not None:
                bits |= self.bits[f.name]
        texts = b""
        for f in self.texts:
            value = values.get(f.name)
            if value is not None:
                bits |= self.bits.get(f.name, 0)
                texts += _pack_text(f, value)
        layout = self.layout(sizes, bits)
        size = layout.texts_at + len(texts)
        local_at = align(size)
        buffer = aligned_bytes(local_at + layout.local_size)
        try:
            write_head(buffer, self.head, self.fingerprint, size, layout.key[0], texts, [*layout.key[1:], *scalars])
        except struct.error as error:
            raise InputError(f"a scalar of {self.name} is out of range: {error}", got=values,
                             fields=tuple(f.name for f in self.scalars)) from None
        arrays = {n: np.ndarray(s, d, buffer, at) for n, s, d, at in layout.replicated}
        for n, s, d, at in layout.local:
            arrays[n] = np.ndarray(s, d, buffer, local_at + at)
        return Packed(self, buffer, size, layout, arrays, values)

    def dims(self, instance: T) -> dict[str, int]:
        """The size of each symbol of an instance whose shapes are valid; 0 where no array present has it."""
        found = dict.fromkeys(self.symbols, 0)
        for name, _, _, binds in self._pack_plan:
            if instance.__dict__[name] is not None:
                shape = instance.__dict__[name].shape
                for symbol, scale, offset, axis in binds:
                    found[self.symbols[symbol]] = (shape[axis] - offset) // scale
        return found

    def pack(self, instance: T) -> Packed[T]:
        """Copy an instance into one new buffer. Its shapes must already be valid."""
        state = instance.__dict__
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        sizes = [0] * len(self.symbols)
        bits = 0
        host = self.kind == "ndarray"
        for name, bit, dtype, binds in self._pack_plan:
            value = state[name]
            if value is None:
                continue
            bits |= bit
            arrays[name] = array = value if host else host_view(value, dtype)
            shape = array.shape
            for symbol, scale, offset, axis in binds:
                sizes[symbol] = (shape[axis] - offset) // scale
        packed = self._build(tuple(sizes), bits, {name: state[name] for name in self.value_names})
        into = packed.arrays
        for name, array in arrays.items():
            into[name][...] = array
        return packed

    def unpack(self, buffer: Any) -> Packed[T]:
        """Read a message in place: every array is a view of `buffer`, which must outlive it.

        Raises:
            WireError: the message is truncated, corrupt, foreign or of another schema, or not in the one form that
                `pack` gives to an instance.
        """
        size, present, texts_size, head = read_head(buffer, self.head, self.fingerprint, self.name)
        n = len(self.symbols)
        key = (present, *head[:n])
        layout = self._layouts.get(key)
        if layout is None or layout.key != key:
            layout = self._arrived(key)
        if layout.texts_at + texts_size != size:
            raise WireError(f"the size of a {self.name} message contradicts its dimensions", got=size,
                            expected=layout.texts_at + texts_size)
        for name, at in self._bools_at:
            if memoryview(buffer)[at] > 1:
                raise WireError(f"{self.name}.{name} is corrupt", got=memoryview(buffer)[at], expected="0 or 1")
        values: dict[str, Any] = {}
        for f, value in zip(self.scalars, head[n:], strict=True):
            if f.optional and not present & self.bits[f.name]:
                if value:
                    raise WireError(f"{self.name}.{f.name} is absent from a message and has a value", got=value)
                value = None
            values[f.name] = value
        if self.texts or texts_size:
            self._read_texts(bytes(memoryview(buffer)[layout.texts_at:size]), present, values)
        arrays = {name: np.ndarray(s, d, buffer, at) for name, s, d, at in layout.replicated}
        raw = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)
        return Packed(self, raw[:size], size, layout, arrays, values)

    def _read_texts(self, raw: bytes, present: int, values: dict[str, Any]) -> None:
        at = 0
        for f in self.texts:
            if f.optional and not present & self.bits[f.name]:
                values[f.name] = None
                continue
            try:
                count, length = struct.unpack_from("<II", raw, at)
                body = raw[at + 8:at + 8 + length].decode()
            except (struct.error, UnicodeDecodeError) as error:
                raise WireError(f"the texts of a {self.name} message are corrupt: {error}") from None
            at += 8 + length
            parts = tuple(body.split("\0")) if count else ()
            if len(parts) != count or (length and not count) or (f.kind == "str" and count != 1):
                raise WireError(f"{self.name}.{f.name} is corrupt", got=f"{len(parts)} texts in {length} bytes",
                                expected=f"{count} texts")
            values[f.name] = parts if f.kind == "texts" else parts[0]
        if at != len(raw):
            raise WireError(f"the texts of a {self.name} message are of another size than it says",
                            got=f"{len(raw)} bytes", expected=f"{at} bytes")

    def markdown(self) -> str:
        """The documentation table of this type."""
        rows = ["| field | type | shape | padding | scope | meaning |", "| --- | --- | --- | --- | --- | --- |"]
        for f in self.fields:
            a = f.array
            kind = (a.dtype if a else f.kind) + (", optional" if f.optional else "")
            shape, pad = (a.shape_text, a.pad) if a else ("", "")
            rows.append(f"| `{f.name}` | {kind} | {shape} | {pad} | {f.scope} | {f.doc} |")
        return "\n".join(rows) + "\n"


def _values_of(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Takes the values of all fields out of an instance's dictionary, in the order of the declaration."""
    if len(names) > 1:
        return itemgetter(*names)  # which returns no tuple where there is one name
    return lambda state: tuple([state[name] for name in names])


def _pack_text(field: Field, value: Any) -> bytes:
    parts = value if field.kind == "texts" else (value,)
    try:
        body = "\0".join(parts).encode()
    except UnicodeEncodeError:
        raise InputError(f"{field.name} contains half of a surrogate pair", got=ascii(value), expected="text that "
                         "UTF-8 can hold", fields=(field.name,)) from None
    if body.count(b"\0") != max(len(parts) - 1, 0):
        raise InputError(f"{field.name} contains a NUL character", got=repr(value), expected="text without NUL",
                         fields=(field.name,))
    return struct.pack("<II", len(parts), len(body)) + body
