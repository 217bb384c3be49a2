"""The adapters that an engine has loaded: their names, and the slots in which the ranks hold them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b

from hal.adapters.files import read_adapter, targets_of
from hal.config import EngineConfig
from hal.errors import CapacityError, ModelLoadError, RequestError
from hal.features.adapter import Adapter
from hal.model_config import ModelConfig
from hal.values import described

_LONGEST = 256  # characters of a name, which the ranks get in a step's message


class AdapterTable:
    """Attributes: named: the loaded adapters by name. One that was unloaded while requests use it is not among them,
    and its slot is free when the last of these requests has ended."""

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        self.config, self.model = config, model
        self.named: dict[str, Adapter] = {}
        self._sizes: dict[str, tuple[int, int]] | None = None
        self._loads = 0

    def make(self, name: str, path: str | os.PathLike[str], used: Iterable[Adapter]) -> Adapter:
        """Check an adapter and find a slot for it. The caller adds it to `named`.

        Args:
            used: adapters of unfinished requests.

        Raises:
            As LLM.load_adapter.
        """
        most, directory = self.config.max_adapters, os.path.abspath(os.path.expanduser(os.fspath(path)))
        if not most:
            raise CapacityError("this engine has no slots for adapters", got="max_adapters=0",
                                expected="an engine made with max_adapters=N")
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _LONGEST:
            raise RequestError("the name of an adapter is not usable", got=described(name),
                               expected=f"1 to {_LONGEST} characters that can be printed")
        if name in self.named:
            raise RequestError("an adapter of this name is loaded", got=f"{name!r}, from {self.named[name].path}",
                               expected="another name", hint="unload it first")
        held = {a.slot for a in (*self.named.values(), *used)}
        slot = next((slot for slot in range(most) if slot not in held), None)
        if slot is None:
            raise CapacityError("no slot for an adapter is free", got=f"{', '.join(sorted(self.named))} of "
                                f"max_adapters={most}", expected="one that can be given",
                                hint="unload an adapter, wait for the requests of one that was unloaded, or raise "
                                     "max_adapters")
        if self._sizes is None:
            self._sizes = targets_of(self.model)
        read_adapter(directory).check(self._sizes, self.config.max_adapter_rank)
        self._loads += 1  # all ranks of a launcher count alike
        key = blake2b(f"adapter {self._loads}".encode(), digest_size=16).digest()
        return Adapter(name, directory, slot, key)

    def check_unload(self, name: str, used: Iterable[Adapter], *, wait: bool) -> None:
        """Raises as LLM.unload_adapter."""
        adapter = self.find(name)
        count = sum(each is adapter for each in used)
        if count and not wait:
            raise RequestError("requests use the adapter", got=f"{name!r}, {count} unfinished requests",
                               expected="none", hint="unload_adapter(..., wait=True) takes the name away now, and "
                               "frees the slot when they have ended")

    def drop_lost(self, used: Iterable[Adapter]) -> dict[Adapter, ModelLoadError]:
        """The loaded and the used adapters whose files can no longer be read, with the errors. `named` has none of them
        afterwards."""
        lost = dict[Adapter, ModelLoadError]()
        for adapter in {*self.named.values(), *used}:
            try:
                read_adapter(adapter.path)
            except ModelLoadError as error:
                lost[adapter] = error
        self.named = {name: adapter for name, adapter in self.named.items() if adapter not in lost}
        return lost

    def find(self, name: str) -> Adapter:
        """Raises RequestError: no adapter of this name is loaded."""
        found = self.named.get(name)
        if found is None:
            raise RequestError("no adapter of this name is loaded", got=described(name), param="adapter",
                               expected=", ".join(sorted(self.named)) or "no name, since none is loaded")
        return found
