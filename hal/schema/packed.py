"""One instance in one buffer: its views, the typed instance over them, staging to a device, padding."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from hal.errors import InputError
from hal.schema.layout import Layout, bfloat16_bits

if TYPE_CHECKING:
    import torch

    from hal.schema.declared import Declared
    from hal.schema.schema import Schema

T = TypeVar("T", bound="Declared")
Buffer = np.ndarray[Any, np.dtype[np.uint8]]


class Packed(Generic[T]):
    """One instance in one buffer.

    Attributes:
        buffer: uint8; `message` is the part of it that travels.
        arrays: numpy views by field (bfloat16 as uint16 bits).
        dims: the size of each symbol; not to be changed, other instances have the same dict.
        moved: the copy of the buffer on another device, which the instance's tensors are views of; None on the host.
    """

    __slots__ = ("arrays", "buffer", "layout", "moved", "schema", "size", "values")

    def __init__(self, schema: Schema[T], buffer: Buffer, size: int, layout: Layout,
                 arrays: dict[str, np.ndarray[Any, Any]], values: dict[str, Any]) -> None:
        self.schema, self.buffer, self.size, self.layout = schema, buffer, size, layout
        self.arrays, self.values = arrays, values
        self.moved: torch.Tensor | None = None

    @property
    def message(self) -> Buffer:
        return self.buffer[:self.size]

    @property
    def dims(self) -> dict[str, int]:
        return self.layout.dims

    def checksum(self) -> int:
        """CRC-32 of the replicated fields, which are the same on all ranks; not of gaps between them, which hold
        anything."""
        schema = self.schema
        crc = zlib.crc32(repr([self.values[name] for name in schema.value_names]).encode())
        for field in schema.replicated:
            array = self.arrays.get(field.name)
            if array is not None:
                crc = zlib.crc32(array.data, zlib.crc32(b"%a%a" % (field.name, array.shape), crc))
        return crc

    def to(self, device: torch.device | str | None = None, non_blocking: bool = False) -> T:
        """The typed instance. On the host its tensors are views of the buffer; for another device the whole buffer is
        moved by one copy and the tensors are views of that. With `non_blocking` the device may copy later: until it has
        done so, nobody writes the buffer."""
        schema = self.schema
        if schema.kind == "ndarray":
            return self.bind(self.arrays)
        import torch

        if device is None or torch.device(device).type == "cpu":
            return self.bind({name: as_tensor(array, schema.by_name[name].array.dtype)  # type: ignore[union-attr]
                              for name, array in self.arrays.items()})
        return self.over(torch.from_numpy(self.buffer).to(device, non_blocking=non_blocking))

    def over(self, moved: torch.Tensor, views: Mapping[str, Any] | None = None) -> T:
        """The typed instance over a copy of the buffer on another device. `views`: those of an earlier call with this
        `moved` and this layout, so that they are not made anew."""
        self.moved = moved
        return self.bind(self.views(moved) if views is None else views)

    def bind(self, arrays: Mapping[str, Any]) -> T:
        """The typed instance over arrays that hold what `self.arrays` holds, wherever they are."""
        schema = self.schema
        state = dict.fromkeys(schema.by_name)
        state.update(self.values)
        state.update(arrays)
        instance = schema.cls.__new__(schema.cls)
        instance.__dict__.update(state)
        instance.__dict__["_packed"] = self, schema.values_of(state)
        return instance

    def views(self, moved: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays as tensors over a copy of the buffer, which may be longer (uint8)."""
        import torch

        base, found = self.buffer.__array_interface__["data"][0], {}
        for name, array in self.arrays.items():
            at = array.__array_interface__["data"][0] - base
            dtype = getattr(torch, self.schema.by_name[name].array.dtype)  # type: ignore[union-attr]
            found[name] = moved[at:at + array.nbytes].view(dtype).view(array.shape)
        return found

    def padded(self, also: Iterable[str] = (), /, **bucket: int) -> Packed[T]:
        """A copy in which the named symbols have a larger size; each array's new rows hold its declared padding, and
        the optional arrays of `also` that are absent hold nothing else.

        Raises:
            InputError: a size in `bucket` is smaller than the real one, or "edge" padding has no row to repeat.
        """
        dims = self.dims
        for symbol, size in bucket.items():
            if symbol not in dims or size < dims[symbol]:
                raise InputError(f"{self.schema.name} does not fit the bucket in {symbol!r}",
                                 got=dims.get(symbol, "no such symbol"), expected=f"at most {size}", fields=(symbol,))
        present = [n for n in self.arrays if n in self.schema.bits]
        out = self.schema.allocate({**dims, **bucket}, {*present, *also}, **self.values)
        for name in {*also} - self.arrays.keys():
            out.fill(name)
        for name, array in self.arrays.items():
            out.fill(name, array)
        return out

    def fill(self, name: str, array: np.ndarray[Any, Any] | None = None) -> None:
        """An array's content: `array`, and behind it the declared padding; nothing but that where it is None.

        Raises:
            InputError: "edge" padding has no row to repeat.
        """
        into, spec = self.arrays[name], self.schema.by_name[name].array
        if array is not None and into.shape == array.shape:
            into[...] = array
            return
        assert spec is not None
        if spec.pad != "edge":
            into[...] = bfloat16_bits(spec.pad) if spec.dtype == "bfloat16" else spec.pad
        elif array is None or not len(array):
            raise InputError(f"{self.schema.name}.{name} has no row to repeat as padding", fields=(name,))
        else:
            into[len(array):] = array[-1:]
        if array is not None:
            into[tuple([slice(s) for s in array.shape])] = array


def as_tensor(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """A host array of a declared dtype as a tensor that shares its memory; the other way is `host_view`."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def host_view(tensor: Any, dtype: str) -> np.ndarray[Any, Any]:
    if tensor.is_cpu and dtype != "bfloat16":
        array: np.ndarray[Any, Any] = tensor.numpy()
        return array
    import torch

    tensor = tensor.cpu()
    bits: np.ndarray[Any, Any] = (tensor.view(torch.uint16) if dtype == "bfloat16" else tensor).numpy()
    return bits


def on_host(instance: Declared, name: str) -> np.ndarray[Any, Any]:
    """The values of an array field, as host_view gives them. Of an instance that was moved to a device they are those
    that were moved, so that nobody waits for the device; other fields may have been replaced since."""
    tensor, fields = instance[name], type(instance).schema.by_name
    source: tuple[Packed[Any], tuple[Any, ...]] | None = instance.__dict__.get("_packed")
    if source is not None and not tensor.is_cpu and source[1][list(fields).index(name)] is tensor:
        return source[0].arrays[name]
    return host_view(tensor, fields[name].array.dtype)  # type: ignore[union-attr]


def packed_source(instance: Declared) -> Packed[Any] | None:
    """The Packed that an instance was made from, as long as no field of it was replaced. A tensor that was written in
    place is seen on the host, where it is a view of the buffer, and is not seen on another device."""
    state = instance.__dict__
    if "_packed" not in state:
        return None
    packed: Packed[Any]
    packed, values = state["_packed"]
    return packed if all(map(is_, packed.schema.values_of(state), values)) else None
