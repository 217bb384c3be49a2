"""A device that every machine has: its tensors have a device type of their own ("fake"), and lie in the host's memory.

It computes at once, and gets the CPU's results. The rest is simulated: which tensors may meet in an operation, copies
that end later than they were issued, waits, shapes that a compiler has or has not seen, and a limit of memory. PyTorch
knows the device as its PrivateUse1; a process can have one such type.
"""

from __future__ import annotations

import ctypes
import gc
import os
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import library as torch_library
from torch.utils._pytree import tree_iter, tree_map_only

from hal.errors import BackendError, CapacityError, DeviceError
from hal.guard.state import caller

TYPE = "fake"
GARBAGE = 0xCB  # every byte that a pending copy will write
_GRANULE = 512  # bytes to which allocations are rounded up
_ADDRESS = 1 << 60  # added to addresses, so that nothing can follow them
_aten = torch.ops.aten
# Operations that make tensors from a size. PyTorch builds its other factories on these.
_FACTORIES = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.arange.default, _aten.arange.start,
              _aten.arange.start_step, _aten.linspace.default, _aten.randperm.default, _aten.eye.default, _aten.eye.m)


class OutOfDeviceMemory(CapacityError, torch.OutOfMemoryError):
    """The error that PyTorch raises for missing memory, as an error of this library too."""


@dataclass
class Watch:
    """The rules and counts that hold while a runner works.

    Attributes:
        static: shapes must be those of the warm-up. forbid_syncs: the host must not wait. warm: the warm-up is over.
        programs: operations with the shapes of their arguments and results. compiled: the number of new ones.
    """

    static: bool
    forbid_syncs: bool
    warm: bool = False
    programs: set[Any] = field(default_factory=set)
    compiled: int = 0


class Device:
    """Attributes:
        memory_bytes, used, peak: the size of its memory, and how much is and was used. syncs: the number of waits of
            the host. issued: the number of copies that the host did not wait for.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes, self.used, self.peak, self.syncs, self.issued = memory_bytes, 0, 0, 0, 0
        self._pending: deque[tuple[int, Callable[[], object]]] = deque()
        self._memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._watch: Watch | None = None
        self._in_step = False

    @cached_property
    def torch_device(self) -> torch.device:
        """The torch.device of its tensors. Raises BackendError: the process has another PrivateUse1 device."""
        register()
        if len(_devices) > 99:  # PyTorch counts to 127
            gc.collect()
        index = next(i for i in count() if i not in _devices)
        _devices[index] = self
        return torch.device(TYPE, index)

    @contextmanager
    def watched(self, watch: Watch, in_step: bool) -> Iterator[None]:
        """Context manager: the block is code of a runner. It is a step or a warm-up, whose shapes count, or it prepares
        a step."""
        before = self._watch, self._in_step
        self._watch, self._in_step = watch, in_step
        try:
            yield
        finally:
            self._watch, self._in_step = before

    # Time.

    def complete(self, until: int) -> None:
        """Do all copies up to the `until`-th. Raises DeviceError: host memory was changed before its copy."""
        while self._pending and self._pending[0][0] <= until:
            with torch.inference_mode():  # in which every tensor may be written
                self._pending.popleft()[1]()

    def synchronize(self, what: str = "synchronize") -> None:
        """The host waits for all copies. Raises DeviceError: it must not wait here, and as `complete`."""
        self._waits(what)
        self.complete(self.issued)

    def _waits(self, what: str) -> None:
        self.syncs += 1
        watch = self._watch
        if watch is not None and watch.forbid_syncs and watch.warm:
            refuse("the host waits for the device in a step", what, hint="keep the value on the device, take it from "
                   "the host's copy (hal.schema.packed.on_host), or copy with non_blocking=True and wait for an Event")

    def _later(self, finish: Callable[[], object]) -> None:
        self.issued += 1
        self._pending.append((self.issued, finish))

    def to_host(self, value: torch.Tensor, into: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        """Issue a copy to the host. `value` is a copy that nobody else holds."""
        if not non_blocking:
            self.synchronize("copy to the host")
            return into.copy_(value)
        garbage = torch.full((into.numel() * into.itemsize,), GARBAGE, dtype=torch.uint8)
        into.copy_(into != into if into.dtype == torch.bool else garbage.view(into.dtype).view(into.shape))
        self._later(lambda: into.copy_(value))
        return into

    def from_host(self, source: torch.Tensor, into: torch.Tensor, non_blocking: bool) -> None:
        """Issue a copy from the host. The device has the bytes at once, since everything that reads them runs later.
        The source counts as being read until the copy is done."""
        into.copy_(source)
        if not non_blocking:
            return self._waits("copy from the host")  # a program must not rely on other copies that are done by then
        sent, site = _bytes(source).clone(), caller()[0]

        def check() -> None:
            if not torch.equal(_bytes(source), sent):
                raise DeviceError("host memory was written before the device had copied it", site=site,
                                  operation="copy from the host", hint="wait for an Event that was recorded after the "
                                  "copy, or use another buffer meanwhile")

        self._later(check)

    # Memory.

    def memory(self, elem: torch.Tensor) -> Memory:
        """The memory of a tensor. Raises OutOfDeviceMemory."""
        storage = elem.untyped_storage()
        found = self._memories.get(storage._cdata)
        if found is None:
            found = self._memories[storage._cdata] = Memory(self, storage)
        return found

    def room(self, size: int) -> int:
        """`size` rounded up. Raises OutOfDeviceMemory."""
        size, free = -(-size // _GRANULE) * _GRANULE, self.memory_bytes - self.used
        if size > free:
            raise OutOfDeviceMemory(f"{self.torch_device} is out of memory at {caller()[0]}", got=f"{size:,} bytes",
                                    expected=f"at most {free:,}, which are left of {self.memory_bytes:,}",
                                    hint="free tensors, count more in reserve_bytes, or give FakeBackend more memory")
        return size

    # Shapes.

    def program(self, what: str, grows: bool, given: Iterable[torch.Tensor], result: Any) -> None:
        watch = self._watch
        if watch is None or not watch.static or not self._in_step:
            return
        if grows:
            refuse("the size of a result depends on data", what, hint="mask with torch.where, and keep the full size")
        shapes = [[(tuple(x.shape), x.dtype) for x in tree_iter(some) if isinstance(x, torch.Tensor)]
                  for some in (given, result)]
        program = what, *map(tuple, shapes)
        if program in watch.programs:
            return
        watch.programs.add(program)
        watch.compiled += 1
        if watch.warm and os.environ.get("HAL_STRICT") == "1":
            refuse("a step has a shape that the warm-up had not", what, got="{} giving {}".format(
                *([list(shape) for shape, _ in some] for some in shapes)), hint="pad it to a size that is warmed up")


class Memory:
    """An allocation, shared by a tensor and its views. It stands in for `Tensor.untyped_storage`."""

    def __init__(self, device: Device, storage: torch.UntypedStorage) -> None:
        self._device, self._storage, self._taken = device, storage, 0
        self._taken = device.room(storage.nbytes())
        device.used += self._taken
        device.peak = max(device.peak, device.used)

    def __del__(self) -> None:
        self._device.used -= self._taken

    def nbytes(self) -> int:
        return self._storage.nbytes()

    def data_ptr(self) -> int:
        """An address that may be compared, but not read."""
        return _ADDRESS + self._storage.data_ptr()


class Event:
    """A place in the order of a device's work."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._at = _device(device), 0

    def record(self) -> None:
        """Record the event behind everything that was issued so far."""
        self._at = self._device.issued

    def synchronize(self) -> None:
        """Wait until the device has reached this event. Raises DeviceError, as Device.complete."""
        self._device.complete(self._at)


class DeviceTensor(torch.Tensor):
    """A tensor of a fake device. Attributes: elem: its content, a CPU tensor. fake, memory: its device and allocation.
    """

    elem: torch.Tensor
    fake: Device
    memory: Memory
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor, device: Device) -> DeviceTensor:
        with torch.inference_mode(elem.is_inference()):  # a view shares the memory of its base
            made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
                cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
                device=device.torch_device)
        made.elem, made.fake, made.memory = elem, device, device.memory(elem)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if _composite(func):
            return func.decompose(*args, **kwargs)
        if func is _aten._to_copy.default:
            return _to_copy(*args, **kwargs)
        if func is _aten.copy_.default:
            return _copy(*args, **kwargs)
        return _run(func, args, kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.memory

    def data_ptr(self) -> NoReturn:
        refuse("device memory is not the host's", "Tensor.data_ptr", hint="copy it with .cpu()")

    def numpy(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse("device memory is not the host's", "Tensor.numpy", hint="copy it with .cpu()")

    __array__ = __dlpack__ = numpy

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.elem!r} on {self.device}"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the device. Raises DeviceError, OutOfDeviceMemory."""
    own: dict[int, DeviceTensor] = {}
    host: list[torch.Tensor] = []

    def opened(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, DeviceTensor):
            host.append(x)
            return x
        own[id(x.elem)] = x
        return x.elem

    inner, named = tree_map_only(torch.Tensor, opened, (args, kwargs))
    device, name, tags = next(iter(own.values())).fake, str(func).removesuffix(".default"), func.tags
    written = any(x is args[0] for x in host) and name.split(".")[1].endswith("_")
    if written or any(x.ndim for x in host) or any(x.fake is not device for x in own.values()):
        refuse("an operation was given tensors of several devices", name, got=", ".join(
            f"{list(x.shape)} on {x.device}" for x in (*own.values(), *host)), expected=f"all on {device.torch_device}",
            hint="move what is on the host with .to(device)")
    if name.startswith("aten.index"):  # if the index is a mask, the size is its number of ones
        grows = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_iter(args[1]))
    else:
        grows = torch.Tag.dynamic_output_shape in tags and kwargs.get("output_size") is None
    if grows or torch.Tag.data_dependent_output in tags:
        device.synchronize(name)
    target = named.get("device")
    if target is not None:
        named["device"] = "cpu"
    reshapes = torch.Tag.inplace_view in tags and func is not _aten.detach_.default
    result = None if reshapes else func(*inner, **named)
    if reshapes or any(x.elem.shape != x.shape for x in own.values()):
        refuse("an operation changes the shape of its argument, which the fake device does not simulate", name)
    if target is not None and target.type != TYPE:
        return result
    device.program(name, grows, own.values(), result)
    return tree_map_only(torch.Tensor, lambda x: own[id(x)] if id(x) in own else DeviceTensor(x, device), result)


def _to_copy(x: DeviceTensor, *, device: torch.device | None = None, non_blocking: bool = False, pin_memory: Any = None,
             **kwargs: Any) -> Any:
    if device is None or (device.type == TYPE and device.index in (None, x.device.index)):
        return _run(_aten._to_copy.default, (x,), kwargs)
    value, late = _aten._to_copy.default(x.elem, **kwargs), non_blocking and device.type == "cpu"
    host = x.fake.to_host(value, torch.empty_like(value) if late else value, late)
    return host if device.type == "cpu" else host.to(device)


def _copy(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if isinstance(into, DeviceTensor) and isinstance(source, DeviceTensor):
        _run(_aten.copy_.default, (into, source), {})
    elif isinstance(into, DeviceTensor):
        into.fake.from_host(source, into.elem, non_blocking)
    elif isinstance(source, DeviceTensor):
        source.fake.to_host(source.elem.clone(), into, non_blocking)
    return into


def refuse(what: str, operation: str, **more: Any) -> NoReturn:
    """Raises DeviceError."""
    raise DeviceError(what, operation=operation, site=caller()[0], **more)


@cache
def _composite(func: Any) -> bool:
    """Whether PyTorch composes the operation of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


_devices: weakref.WeakValueDictionary[int, Device] = weakref.WeakValueDictionary()
_kept: list[Any] = []  # what PyTorch was told of the device


def _device(device: torch.device) -> Device:
    found = _devices.get(device.index or 0)
    if found is None:
        raise BackendError("there is no such fake device", got=device, hint="make a FakeBackend, and call its `device`")
    return found


def taken() -> str | None:
    """The other device that this process has as PyTorch's PrivateUse1, if any."""
    name: str = torch._C._get_privateuse1_backend_name()
    return None if name in ("privateuseone", TYPE) else name


def register() -> None:
    """Register the device with PyTorch, once in a process. Raises BackendError."""
    if _kept:
        return
    if taken():
        raise BackendError("PyTorch has another PrivateUse1 device in this process", got=taken(), expected=TYPE)
    py: Any = torch
    py.utils.rename_privateuse1_backend(TYPE)
    module: Any = types.ModuleType(f"torch.{TYPE}")
    module.is_available, module.current_device, module.device_count = lambda: True, lambda: 0, lambda: len(_devices)
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    py._register_device_module(TYPE, module)
    library: Any = torch_library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for func in _FACTORIES:
        library.impl(func, lambda *args, func=func, **kwargs: _make(func, args, kwargs), "PrivateUse1")
    library.impl("_copy_from", lambda source, into, non_blocking=False: _copy(into, source, non_blocking),
                 "PrivateUse1")  # of torch.tensor(data)
    _kept.extend((library, *_guard()))


def _guard() -> list[object]:
    """Device guards of PyTorch, which do nothing here. torch.distributed must not take the device for an
    accelerator."""
    acc: Any = getattr(torch._C, "_acc", None)
    if hasattr(acc, "register_python_privateuseone_device_guard"):
        kind: Any = torch._C._autograd.DeviceType.PrivateUse1
        guard = type("Guard", (acc.DeviceGuard,), {"type_": lambda self: kind})()
        acc.register_python_privateuseone_device_guard(guard)
        answers = {"is_built": lambda self: True, "is_available": lambda self: False,
                   "has_primary_context": lambda self, index: False}
        hooks = type("Hooks", (acc.PrivateUse1Hooks,), answers)()
        acc.register_python_privateuseone_hook(hooks)
        return [guard, hooks]
    # An older torch takes a guard from C++ only. The guard of the meta device does nothing, but then
    # torch.distributed.barrier fails.
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    registry[20] = registry[14]  # c10::DeviceType: PrivateUse1, Meta
    return [library]


def _make(func: Any, args: Any, kwargs: dict[str, Any]) -> DeviceTensor:
    device = _device(kwargs["device"])
    kwargs.pop("pin_memory", None)
    device.room(func(*args, **{**kwargs, "device": "meta"}).untyped_storage().nbytes())  # until the host writes it
    return DeviceTensor(func(*args, **{**kwargs, "device": "cpu"}), device)
