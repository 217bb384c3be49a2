"""The always-on tier: every call of torch.distributed that ends in a method or a constructor of a process group, a
backend or a store.

The guard patches these methods, and not the functions above them, for three reasons: a reference that was saved before
install() is guarded too; the functions torch.distributed.* stay the same objects (P2POp and torch.compile compare their
identity); and no list of collectives is needed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

from hal.guard.patch import Patches

# A public method that is not known to be local is guarded, so that a collective added by a new torch is caught.
# abort counts as local on purpose: a failing rank frees its peers by it.
_LOCAL: Final = frozenset({
    "rank", "size", "name", "getBackendName", "abort", "set_timeout", "get_group_store", "boxed", "unbox",
    "allocate_tensor", "memory_stats", "use_pg_for_symm_mem_rendezvous", "setUsePgForSymmMemRendezvous",
    "has_extended_api",
})  # fmt: skip
_PRIVATE: Final = frozenset({"_allgather_base", "_reduce_scatter_base", "_start_coalescing", "_end_coalescing"})
# Methods that only subclasses of a root class have. A group of a library's calls is launched where it ends.
_OF_SUBCLASSES: Final = ("perform_nocolor_split", "_group_start", "_group_end")
# The constructor of a class below a root class connects: it exchanges addresses through a store, opens the store's
# socket, or counts itself in the store's file. These constructors do not; the root classes' own neither.
_LOCAL_CONSTRUCTORS: Final = frozenset({"HashStore", "PrefixStore", "FakeProcessGroup", "_ProcessGroupWrapper"})
# Classes whose public methods are mostly local, by name.
_ONLY: Final = {"_SymmetricMemory": ("rendezvous", "barrier", "put_signal", "wait_signal", "stream_write_value32")}
_ROOTS: Final = ("ProcessGroup", "Backend", "Store", "_ControlCollectives", "_SymmetricMemory")
# Groups are made and ended by functions. Saved references to them end in the helper, in a constructor or in shutdown().
_GROUP_FUNCTIONS: Final = (
    "init_process_group", "destroy_process_group", "new_group", "new_subgroups", "new_subgroups_by_enumeration",
    "split_group", "shrink_group", "_new_process_group_helper",
)  # fmt: skip
# C++ functions that call a process group without its Python methods (DistributedDataParallel makes itself with them).
_C_FUNCTIONS: Final = ("_broadcast_coalesced", "_verify_params_across_processes")


def patch_torch(patches: Patches) -> None:
    """Guard torch.distributed. Without torch, or without its distributed package, this does nothing."""
    try:
        import torch.distributed as dist
    except ImportError:
        return
    if not dist.is_available():
        return
    from torch._C import _distributed_c10d as c10d
    from torch.distributed import distributed_c10d

    for root_name in _ROOTS:
        root = getattr(c10d, root_name, None)
        if root is not None:
            _guard_tree(patches, root, guarded_names(root))
    modules: tuple[ModuleType, ...] = (distributed_c10d, dist)
    for module in modules:
        names = (*_GROUP_FUNCTIONS, *_C_FUNCTIONS)
        patches.guard(module, [name for name in names if name in vars(module)], "torch.distributed")


def guarded_names(root: type) -> tuple[str, ...]:
    """The methods of a root class that communicate."""
    if root.__name__ in _ONLY:
        return _ONLY[root.__name__]
    return tuple(name for name, member in vars(root).items() if _communicates(root, name, member))


def _communicates(root: type, name: str, member: object) -> bool:
    if name in _LOCAL or name.startswith("supports_") or (name.startswith("_") and name not in _PRIVATE):
        return False
    return not isinstance(member, (type, property)) and callable(getattr(root, name))


def _guard_tree(patches: Patches, root: Any, names: tuple[str, ...]) -> None:
    """Guard `root`, its subclasses, and the subclasses that Python code will define (a plug-in's ProcessGroup)."""

    def visit(cls: type) -> None:
        guarded = names if cls is root else (*names, *_OF_SUBCLASSES, "__init__")
        if cls.__name__ in _LOCAL_CONSTRUCTORS:
            guarded = names
        patches.guard(cls, [name for name in guarded if name in vars(cls)], cls.__name__)

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        super(root, cls).__init_subclass__(**kwargs)
        visit(cls)

    pending: list[type] = [root]
    seen: set[type] = set()
    while pending:
        cls = pending.pop()
        if cls not in seen:
            seen.add(cls)
            visit(cls)
            pending.extend(type.__subclasses__(cls))
    patches.replace(root, "__init_subclass__", classmethod(init_subclass))
