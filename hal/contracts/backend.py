"""Backends: a device in at most ten members, and how it is found (entry point group `hal.backends`)."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from hal.config import Topology
from hal.contracts import VERSION
from hal.contracts.device import GLOO, Collectives, DeviceRuntime
from hal.errors import BackendError
from hal.values import imported, origin

if TYPE_CHECKING:
    import torch

    from hal.config import EngineConfig, WorkerConfig
    from hal.contracts.communicator import Communicator
    from hal.contracts.runner import ModelRunnerBase

GROUP = "hal.backends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend declares about itself. A configuration that asks for more is refused at construction.

    Attributes:
        contracts: the version of hal.contracts that the backend was written for, "MAJOR.MINOR". `load` refuses another
            major version than its own, and a newer minor one.
        dtypes: of weights and KV cache, preferred first.
        max_tp, max_pp: largest parallel sizes it runs.
        swap: KV blocks can be swapped to host memory. fp8_kv: they can be kept as fp8.
        spmd: one process drives the devices of all tensor-parallel ranks (a compiler shards the tensors), so a worker's
            topology has tp=1, and the runner reads EngineConfig.tp.
        asynchronous: execute_model returns before the device is done, and the runner keeps pending tokens on the device
            (hal.paged.pending).
        host_memory: the device's memory is the host's, shared with other programs. So the ranks of a host share what
            free_memory says, and a KV cache of automatic size is no larger than max_num_seqs sequences need. A device
            that has memory of its own although its tensors for torch are of type "cpu" declares False. Without a
            declaration, a torch.device of type "cpu" counts as host memory, and no other type does.
        ray_resource: a rank takes one of this resource of a Ray cluster: "CPU", "GPU", or another name that the
            cluster's nodes offer.
        token_cost: the time by which one token more lengthens a decode step, in decode steps of one token. Speculative
            decoding weighs it against the tokens that it expects to gain.
        batch_invariant: "always": a request gives the same tokens and logprobs, to the last bit, whatever else is in
            its batch and however its prompt is cut into chunks; "option": only with
            EngineConfig.batch_invariant; "no": neither.
        embeddings: the backend's runner turns texts into vectors where the model has an EmbeddingConfig.
        adapters: the backend's runner has slots for adapters (ModelRunnerBase.load_adapter).
        checkpoints: the backend computes with the checkpoint, in topologies that `hal.models.check_topology` accepts.
            If False, its tokens follow from arithmetic of its own.
    """

    contracts: str = ""
    dtypes: tuple[str, ...] = ("float32",)
    max_tp: int = 1
    max_pp: int = 1
    swap: bool = True
    fp8_kv: bool = False
    spmd: bool = False
    asynchronous: bool = False
    host_memory: bool | None = None
    ray_resource: str = "CPU"
    token_cost: float = 0.1
    batch_invariant: str = "no"
    embeddings: bool = False
    adapters: bool = False
    checkpoints: bool = True


class Backend(abc.ABC):
    """One device. Subclass it, make an instance, and name the instance as an entry point in the group `hal.backends`:
    `mydevice = "mypackage:backend"`. Importing the module must be cheap and must not need the device."""

    name: str
    priority: int = 0  # "auto" takes the available backend with the highest
    capabilities: Capabilities
    collectives: Collectives = GLOO  # process groups of the default communicator and of control_plane="collectives"
    runtime: DeviceRuntime = DeviceRuntime()  # the device's streams, events and host memory

    @abc.abstractmethod
    def unavailable(self) -> str | None:
        """Why this machine cannot run it (one sentence that says what to do), or None when it can."""

    @abc.abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """The device of the local_rank-th worker on this host, made current for this process."""

    @abc.abstractmethod
    def free_memory(self, device: torch.device) -> int:
        """Bytes that can still be allocated."""

    @abc.abstractmethod
    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator,
                    ) -> ModelRunnerBase[Any]: ...

    def versions(self) -> Mapping[str, str]:
        """Names and versions of the libraries that it needs, for `hal env`."""
        return {}


def in_host_memory(backend: Backend, device: torch.device) -> bool:
    """Whether the device's memory is the host's (Capabilities.host_memory)."""
    declared = backend.capabilities.host_memory
    return device.type == "cpu" if declared is None else declared


def names() -> list[str]:
    """All installed backends."""
    return sorted(_entries())


def load(name: str) -> Backend:
    """A backend by name or as "module:attribute", whether it is available here or not.

    Raises:
        BackendError: unknown, or its module fails to import, or it is not a Backend, or it was written for a version of
            hal.contracts that this one does not serve.
    """
    entry = EntryPoint(name, name, GROUP) if all(name.partition(":")) else _entries().get(name)
    if entry is None:
        raise BackendError("unknown device", got=repr(name), expected=", ".join(["auto", *names()]),
                           hint="install the package that provides it, or give module:attribute")
    try:
        backend = imported(entry.value if entry.attr else f"{entry.value}:backend")
        contracts = backend.capabilities.contracts if isinstance(backend, Backend) else ""
    except Exception as error:
        found = origin(entry.value) if isinstance(error, (ImportError, AttributeError)) else ""
        raise BackendError(f"backend {name!r} does not load", got=f"{type(error).__name__}: {error}",
                           hint=found or f"`hal env` lists backends and why they are rejected. A backend for another "
                           f"version of hal.contracts than {VERSION} may not load") from error
    if not isinstance(backend, Backend):
        raise BackendError(f"{entry.value} is not a backend", got=type(backend).__name__, expected="hal.Backend")
    _check_contracts(name, contracts)
    return backend


def _check_contracts(name: str, written_for: str) -> None:
    """Raises BackendError where a backend that was written for this version of hal.contracts may not work."""
    major, minor = VERSION.split(".")
    theirs = written_for.split(".") if isinstance(written_for, str) else []
    if len(theirs) != 2 or not all(part.isdecimal() for part in theirs):
        raise BackendError(f"backend {name!r} does not say which version of hal.contracts it was written for",
                           got=repr(written_for), expected=f'Capabilities(contracts="{VERSION}")',
                           hint="CHANGELOG.md lists what changed since version 1: adapt the backend, then declare the "
                                "version")
    if theirs[0] != major or int(theirs[1]) > int(minor):
        newer = (int(theirs[0]), int(theirs[1])) > (int(major), int(minor))
        raise BackendError(f"backend {name!r} was written for another version of hal.contracts", got=written_for,
                           expected=f"{VERSION}, or an older one of version {major}", hint="install a newer hal-runtime"
                           if newer else "install a release of the backend for this version, or adapt it: CHANGELOG.md "
                           "lists what changed")


def select(name: str) -> Backend:
    """An available backend; "auto" takes the one with the highest priority.

    Raises:
        BackendError: unknown, or not available here (with the reason).
    """
    if name == "auto":
        found = [backend for backend, reason in survey().values() if backend is not None and reason is None]
        if not found:
            reasons = "; ".join(f"{n}: {reason}" for n, (_, reason) in survey().items())
            raise BackendError("no backend is available", got=reasons or "none installed")
        return max(found, key=lambda b: b.priority)
    backend = load(name)
    reason = backend.unavailable()
    if reason is not None:
        usable = [n for n, (_, why) in survey().items() if why is None]
        raise BackendError(f"device {name!r} is not available here", got=reason,
                           expected=f"one of: {', '.join(usable)}", hint="`hal env` shows all of them")
    return backend


def survey(*more: str) -> dict[str, tuple[Backend | None, str | None]]:
    """Each installed backend, and those of `more`, with the reason why it cannot be used, or None."""
    found: dict[str, tuple[Backend | None, str | None]] = {}
    for name in dict.fromkeys((*names(), *more)):
        try:
            backend = load(name)
            found[name] = backend, backend.unavailable()
        except Exception as error:
            found[name] = None, str(error)
    return found


def resolve_dtype(backend: Backend, wanted: str, checkpoint: str) -> str:
    """The dtype for "auto": the checkpoint's dtype if the backend has it, else float32."""
    if wanted != "auto":
        return wanted
    return checkpoint if checkpoint in backend.capabilities.dtypes else "float32"


def resolve_async(backend: Backend, engine: EngineConfig) -> bool:
    """The value for async_scheduling=None."""
    if engine.async_scheduling is not None:
        return engine.async_scheduling
    return backend.capabilities.asynchronous and engine.pp == 1 and engine.speculate is None


def mesh(backend: Backend, engine: EngineConfig) -> Topology:
    """The driver's place in the mesh of the engine's processes. Where one process drives the devices of all
    tensor-parallel ranks (Capabilities.spmd), that is a mesh of pipeline stages alone."""
    if backend.capabilities.spmd:
        return Topology(pp=engine.pp)
    return Topology(engine.tp, engine.pp, ep=engine.ep)


def require(backend: Backend, *, dtype: str, kv_dtype: str, tp: int, pp: int, num_cpu_blocks: int,
            embeddings: bool = False, batch_invariant: bool = False, max_adapters: int = 0) -> None:
    """Check a configuration against the declared capabilities.

    Raises:
        BackendError: naming what is missing and the alternative.
    """
    can = backend.capabilities
    _within(backend, "dtype", dtype, can.dtypes)
    if tp > can.max_tp:
        raise BackendError(f"backend {backend.name!r} cannot split tensors this far", got=f"tp={tp}",
                           expected=f"at most {can.max_tp}")
    if pp > can.max_pp:
        raise BackendError(f"backend {backend.name!r} cannot split layers this far", got=f"pp={pp}",
                           expected=f"at most {can.max_pp}")
    if batch_invariant and (can.batch_invariant not in ("option", "always") or embeddings):
        raise BackendError(f"backend {backend.name!r} does not offer the same bits in any batch",
                           got="batch_invariant=True", expected="batch_invariant=False" if not embeddings else
                           "a model that generates", hint="`hal env` says which devices offer it")
    if embeddings and not can.embeddings:
        raise BackendError(f"backend {backend.name!r} makes no embeddings", got="a model of embeddings",
                           expected='a model that generates, or pooling="none" where the model has a head',
                           hint="run it on --device cpu")
    if max_adapters and (embeddings or not can.adapters):
        raise BackendError("a model of embeddings takes no adapters" if embeddings else
                           f"backend {backend.name!r} takes no adapters", got=f"max_adapters={max_adapters}",
                           expected="max_adapters=0", hint="peft's merge_and_unload makes a checkpoint of model and "
                           "adapter, which runs everywhere")
    if kv_dtype == "fp8" and not can.fp8_kv:
        raise BackendError(f"backend {backend.name!r} has no fp8 KV cache", got=f"kv_dtype={kv_dtype}",
                           expected="kv_dtype=auto")
    if num_cpu_blocks and not can.swap:
        raise BackendError(f"backend {backend.name!r} cannot swap KV blocks", got=f"num_cpu_blocks={num_cpu_blocks}",
                           expected="num_cpu_blocks=0 (preempted sequences are recomputed)")


def _within(backend: Backend, what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise BackendError(f"backend {backend.name!r} has no such {what}", got=value, expected=" or ".join(allowed))


def _entries() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=GROUP)}
