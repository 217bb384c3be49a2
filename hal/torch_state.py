"""torch's settings while the library runs in the caller's process.

The other ranks run in processes of their own, where nobody has changed a default. The driver's rank shares the caller's
process, and would inherit its default device and dtype, autocast, grad mode, deterministic algorithms, precision of
matrix products and number of threads. A step that depends on them is wrong, or differs between ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache, partial
from types import TracebackType
from typing import Any

import torch
import torch.utils._device as torch_device
from torch._C import (  # in each step: torch's own wrappers of these take as long again
    _get_deterministic_algorithms,
    _get_float32_matmul_precision,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    get_default_dtype,
    is_grad_enabled,
    is_inference_mode_enabled,
)
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

_HIGHEST = "highest"  # the default precision of float32 matrix products


class TorchState:
    """A context in which torch has the settings of a new process. At its end torch has the caller's settings again. It
    may be entered within itself.

    Args:
        threads: the number of threads that torch uses for one operation; None does not change it.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = torch.get_num_threads() if threads is None else threads
        self._fresh = self.threads, 0, 0, torch.float32, True, False, False, False, _HIGHEST
        self._undo: list[ExitStack | None] = []

    def __enter__(self) -> None:
        found = (torch.get_num_threads(), _len_torch_function_stack(), _len_torch_dispatch_stack(),
                 get_default_dtype(), is_grad_enabled(), is_inference_mode_enabled(), _is_any_autocast_enabled(),
                 _get_deterministic_algorithms(), _precision())
        self._undo.append(None if found == self._fresh else self._change(found))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        undo = self._undo.pop()
        if undo is not None:
            undo.close()

    def _change(self, found: tuple[Any, ...]) -> ExitStack:
        threads, functions, dispatches, dtype, _, inference, autocast, deterministic, precision = found
        undo = ExitStack()
        if threads != self.threads:
            _set(undo, torch.set_num_threads, self.threads, threads)
        if functions:  # the default device is one of these modes
            _set(undo, lambda device: setattr(torch_device, "CURRENT_DEVICE", device), None,
                 torch_device.CURRENT_DEVICE)
            for _ in range(functions):
                undo.callback(_push_mode, _pop_mode())  # type: ignore[no-untyped-call]
        if dispatches:
            undo.enter_context(_disable_current_modes())
        if dtype != torch.float32:
            _set(undo, torch.set_default_dtype, torch.float32, dtype)
        if inference:  # before grad mode, which it changes
            undo.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            _set(undo, torch._C._set_grad_enabled, True, False)
        if autocast:
            for device in _autocast_types():
                if torch.is_autocast_enabled(device):
                    _set(undo, partial(torch.set_autocast_enabled, device), False, True)
        if deterministic:
            _set(undo, torch.set_deterministic_debug_mode, 0, torch.get_deterministic_debug_mode())
        if precision != _HIGHEST:
            settings = [(kind, kind.fp32_precision) for kind in _products()] if precision is None else []
            torch.set_float32_matmul_precision(_HIGHEST)
            if precision is not None:
                undo.callback(torch.set_float32_matmul_precision, precision)
            for kind, value in settings:
                undo.callback(setattr, kind, "fp32_precision", value)
        return undo


def _set(undo: ExitStack, write: Callable[[Any], object], value: Any, before: Any) -> None:
    write(value)
    undo.callback(write, before)


@cache
def _autocast_types() -> tuple[str, ...]:
    """The types of device that have autocast, of all that torch has a name for."""
    types: Any = torch._C._autograd.DeviceType
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that no device has any more
        for name in (*map(str.lower, types.__members__), "privateuseone"):
            with suppress(RuntimeError):  # the enumeration's name is not the device's
                if torch.amp.is_autocast_available(name):
                    found.append(name)
    return tuple(found)


def _precision() -> str | None:
    """The precision of float32 matrix products; None where the caller has set it for single libraries."""
    try:
        return _get_float32_matmul_precision()
    except RuntimeError:
        return None


def _products() -> list[Any]:
    """The settings of the matrix products of each library behind torch."""
    products = (getattr(library, "matmul", None) for library in vars(torch.backends).values())
    return [each for each in products if hasattr(each, "fp32_precision")]

