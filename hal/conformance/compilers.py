"""The programs that the loaded compilers have made in this process, by their own count. A runner's `compiled` is the
runner's word alone."""

from __future__ import annotations

import sys
from typing import Any

_JAX_EVENT = "/jax/core/compile/backend_compile_duration"
_jax_programs: list[str] = []  # one entry for each program, since a listener of jax cannot be asked for its count


def _of_jax(event: str, seconds: float, **_: Any) -> None:
    if event == _JAX_EVENT:
        _jax_programs.append(event)


def watch() -> None:
    """Begin to count the programs of compilers that can only be listened to. Idempotent."""
    monitoring: Any = getattr(sys.modules.get("jax"), "monitoring", None)
    if monitoring is not None and not hasattr(monitoring, "_hal_listens"):
        monitoring.register_event_duration_secs_listener(_of_jax)
        monitoring._hal_listens = True


def programs() -> int:
    """Programs of torch.compile and of JAX."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return len(_jax_programs) + (dynamo.counters["stats"]["unique_graphs"] if dynamo else 0)
