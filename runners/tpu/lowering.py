"""All calls of torch_xla. The rest of the runner uses a compiler only through these functions and `Program`. Another
bridge to XLA (torch_tpu) would be a second module with the same names.

A program is traced once, lazily, and replayed from then on, so a step needs no tracing. Its state (the KV caches) is
donated: outputs take over the buffers, and nothing is copied.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hal.errors import BackendError, StateError

Traced = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], tuple[Sequence[torch.Tensor],
                                                                         Sequence[torch.Tensor]]]


@cache
def _xla() -> Any:
    """torch_xla and the parts of it that are used. The persistent cache is chosen before anything is computed."""
    import torch_xla
    import torch_xla.core.xla_model
    import torch_xla.debug.metrics
    import torch_xla.distributed.spmd
    import torch_xla.runtime
    import torch_xla.utils.buffer_donor_context

    folder = cache_folder()
    if folder is not None and not torch_xla._XLAC._xla_computation_cache_is_initialized():
        folder.mkdir(parents=True, exist_ok=True)
        torch_xla.runtime.initialize_cache(str(folder))
    return torch_xla


def cache_folder() -> Path | None:
    """The folder in which compiled programs are kept between starts. It is None on XLA's CPU client, whose executables
    cannot be read back (torch_xla 2.8: "Deserializing serialized executable not supported"), unless
    XLA_PERSISTENT_CACHE_PATH is set."""
    chosen = os.environ.get("XLA_PERSISTENT_CACHE_PATH")
    if chosen:
        return Path(chosen)
    if os.environ.get("PJRT_DEVICE") == "CPU":
        return None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hal" / "xla"


def device() -> torch.device:
    _xla()
    return torch.device("xla:0")


def device_kind() -> str:
    """The kind of PJRT's devices: "TPU", "CPU", ..."""
    kind: str = _xla().runtime.device_type()
    return kind


def num_devices() -> int:
    count: int = _xla().runtime.global_runtime_device_count()
    return count


def devices_seen() -> str:
    """The devices of this host, as a text for people: "4 TPU"."""
    return f"{num_devices()} {device_kind()}"


def free_bytes() -> int | None:
    """Free memory of the first device, or None if PJRT does not tell."""
    try:
        info = _xla().core.xla_model.get_memory_info("xla:0")
        return int(info["bytes_limit"]) - int(info["bytes_used"])
    except (RuntimeError, KeyError):
        return None


def settle(tensors: Sequence[torch.Tensor]) -> None:
    """Compute pending writes to these tensors that were not made by a program."""
    if any(_xla()._XLAC._check_tensor_need_materialization(list(tensors))):
        _xla().sync(wait=True)


def wait() -> None:
    _xla().core.xla_model.wait_device_ops()


def compiles() -> int:
    """The number of programs that this process has compiled, or read from the persistent cache."""
    return _counter("UncachedCompile")


def cache_hits() -> int:
    """The number of programs that were read from the persistent cache."""
    return _counter("PersistentCacheHit")


def _counter(name: str) -> int:
    return _xla().debug.metrics.counter_value(name) or 0


def use_mesh(tp: int) -> Any:
    """Turn on SPMD over all devices of this process. The devices of a row of the mesh share tensors, and all rows hold
    the same. It holds for the whole process.

    Raises:
        BackendError: the devices cannot be arranged in this way.
    """
    xla, count = _xla(), num_devices()
    if count % tp:
        raise BackendError(f"tp={tp} does not fit the devices that PJRT shows", got=devices_seen(),
                           expected=f"a multiple of {tp} devices",
                           hint=f"with PJRT_DEVICE=CPU set CPU_NUM_DEVICES={tp} before the process starts")
    if not xla.runtime.is_spmd():
        xla.runtime.use_spmd()
    return xla.distributed.spmd.Mesh(np.arange(count), (count // tp, tp), ("copy", "tp"))


def shard(tensor: torch.Tensor, mesh: Any, dim: int | None) -> torch.Tensor:
    """Annotate a tensor: dimension `dim` is sharded over tp, or (None) every device holds all of it. Returns the
    tensor.
    """
    spec = tuple("tp" if i == dim else None for i in range(tensor.ndim))
    spmd = _xla().distributed.spmd
    spmd.clear_sharding(tensor)
    spmd.mark_sharding(tensor, mesh, spec)
    return tensor


def place(tensor: torch.Tensor, mesh: Any, dim: int | None) -> torch.Tensor:
    """A copy of a host tensor on the device, or on all devices of the mesh (see `shard`)."""
    moved = tensor.to(device())
    return moved if mesh is None else shard(moved, mesh, dim)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, mesh: Any, dim: int | None) -> torch.Tensor:
    """A tensor of zeros, made on the device or on all devices of the mesh."""
    made = torch.zeros(shape, dtype=dtype, device=device())
    if mesh is not None:
        shard(made, mesh, dim)
    _xla().sync(wait=True)
    return made


def to_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of host tensors, moved by one call; under SPMD to every device."""
    if _xla().runtime.is_spmd():
        return [tensor.to("xla:0") for tensor in tensors]
    moved: list[torch.Tensor] = _xla()._XLAC._xla_tensors_from_aten(list(tensors), ["xla:0"] * len(tensors))
    return moved


def ragged_attention(q: torch.Tensor, pages: torch.Tensor, seq_lens: torch.Tensor, tables: torch.Tensor,
                     starts: torch.Tensor, scale: float, window: int | None, kernel: bool = True) -> torch.Tensor:
    """The TPU's kernel (arXiv 2503.08311's idea, torch_xla's Pallas code; needs jax): q [T, heads, head_dim], pages
    [blocks, block_size, 2 * kv_heads, head_dim] with keys at even and values at odd heads. `kernel=False` is
    torch_xla's own reference, whose shapes depend on data."""
    importlib.import_module("torch_xla.experimental.custom_kernel")  # registers the operator

    count = torch.tensor([tables.shape[0]], dtype=torch.int32, device=q.device)
    out: torch.Tensor = torch.ops.xla.ragged_paged_attention(q, pages, seq_lens, tables, starts, count, sm_scale=scale,
                                                             sliding_window=window, use_kernel=kernel)
    return out


class Program:
    """A function of tensors of fixed shapes, compiled.

    Args:
        function: (arguments, state) -> (new state, results). It changes neither arguments nor state. Other tensors that
            it reads (weights) are bound by reference.
        arguments, state: tensors with the shapes of every call. Nothing is executed here.

    Raises:
        BackendError: an operation has no XLA lowering, and would leave the device in every step.
    """

    def __init__(self, function: Traced, arguments: Sequence[torch.Tensor], state: Sequence[torch.Tensor] = ()) -> None:
        xla, c = _xla(), _xla()._XLAC
        xla.sync(wait=True)
        given = [*arguments, *state]
        for tensor in state:
            c._set_buffer_donation(tensor, True)
        fallbacks = set(xla.debug.metrics.executed_fallback_ops())
        new_state, results = function(arguments, state)
        outputs = [*new_state, *results]
        new = set(xla.debug.metrics.executed_fallback_ops()) - fallbacks
        if new:
            raise BackendError("a program uses operations that XLA cannot run", got=", ".join(sorted(new)),
                               hint="write them with others, or give the backend its own")
        wait()  # scalars that tracing put on the device
        _, values = c._get_tensors_xla_device_data_node(outputs)
        # By the identity of the data: under SPMD a tensor's own id is not that of its data.
        places = {handle: i for i, handle in enumerate(c._get_tensors_handle(given))}
        found = [places.get(handle) for handle in c._get_tensors_handle(values)]
        self._inputs = [(i, None if i is not None else value) for i, value in zip(found, values, strict=True)]
        used = set(found)
        if not used.issuperset(range(len(arguments), len(given))):
            raise StateError("a program does not take its state as input", got=used, expected=f"{len(state)} tensors")
        with xla.utils.buffer_donor_context.alias_with_buffer_donor_config():
            self._hash = c._get_graph_hash(outputs)
            c._xla_warm_up_cache(outputs, [])
        self._shapes = [tensor.shape for tensor in given]
        self._num_state, self._run = len(state), c._run_cached_graph
        self._replace = c._replace_xla_tensor

    def __call__(self, arguments: Sequence[torch.Tensor], state: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """Launch the program. The state's tensors take their new values in place. Returns the results."""
        given = [*arguments, *state]
        if [tensor.shape for tensor in given] != self._shapes:
            raise StateError("a program is called with other shapes than it was compiled for",
                             got=[list(tensor.shape) for tensor in given], expected=[list(s) for s in self._shapes])
        outputs = self._run(self._hash, [value if i is None else given[i] for i, value in self._inputs])
        for tensor, new in zip(state, outputs, strict=False):
            self._replace(tensor, new)
        results: list[torch.Tensor] = outputs[self._num_state:]
        return results
