"""Functions and methods are replaced by guarded ones, and every replacement can be undone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hal.guard.state import STATE, refuse

Function = Callable[..., Any]


def guarded_function(operation: str, original: Function) -> Function:
    def call(*args: Any, **kwargs: Any) -> Any:
        region = STATE.get()
        if region is not None and not region.open:
            refuse(operation)
        return original(*args, **kwargs)

    return functools.update_wrapper(call, original)


def guarded_method(operation: str, original: Function) -> Function:
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        region = STATE.get()
        if region is not None and not region.open:
            refuse(operation)
        return original(self, *args, **kwargs)

    functools.update_wrapper(call, original)
    # A C++ virtual called on an instance of a Python subclass looks for a Python override, and finds this function.
    # pybind knows a call from within the override by its frame's code name and first argument; else this recurses.
    call.__code__ = call.__code__.replace(co_name=operation.rpartition(".")[2])
    return call


class Patches:
    """A list of changes, which are undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._finder: _AfterImport | None = None

    def on_restore(self, undo: Callable[[], object]) -> None:
        self._undo.append(undo)

    def replace(self, owner: Any, name: str, value: object) -> None:
        if name in vars(owner):
            self.on_restore(functools.partial(setattr, owner, name, vars(owner)[name]))
        else:
            self.on_restore(functools.partial(delattr, owner, name))  # it was inherited
        setattr(owner, name, value)

    def guard(self, owner: type | ModuleType, names: Sequence[str], label: str) -> None:
        """Guard each of `names` that `owner` has; a version of the library may lack some of them."""
        for name in names:
            original = getattr(owner, name, None)
            if not callable(original):
                continue
            operation = f"{label}.{name}"
            if isinstance(owner, ModuleType):
                self.replace(owner, name, guarded_function(operation, original))
            elif isinstance(vars(owner).get(name), (staticmethod, classmethod)):
                self.replace(owner, name, staticmethod(guarded_function(operation, original)))
            else:
                self.replace(owner, name, guarded_method(operation, original))

    def after_import(self, module: str, action: Callable[[ModuleType], None]) -> None:
        """Run `action` on `module` now if it is loaded, else right after its first import. This never imports it."""
        loaded = sys.modules.get(module)
        if loaded is not None:
            action(loaded)
            return
        if self._finder is None:
            self._finder = _AfterImport()
            sys.meta_path.insert(0, self._finder)
            self.on_restore(self._remove_finder)
        self._finder.actions[module] = action

    def _remove_finder(self) -> None:
        if self._finder is not None:
            self._finder.actions.clear()
            sys.meta_path.remove(self._finder)
            self._finder = None

    def restore(self) -> None:
        while self._undo:
            self._undo.pop()()


class _AfterImport:
    """A meta path finder that finds nothing itself: it makes the real loader call back."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_act(module: ModuleType) -> None:
            exec_module(module)
            action = self.actions.pop(name, None)  # none after uninstall()
            if action is not None:
                action(module)

        spec.loader.exec_module = exec_and_act  # type: ignore[method-assign]
        return spec
