"""Ray as this library uses it: an optional package, and a cluster that is joined or started."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hal.errors import BackendError

# Ray sets it where it starts a cluster, refuses those that lack it, and reads it when it is imported.
_MODE = "RAY_AUTH_MODE"


def join_cluster(user: str, where: str = "") -> Any:
    """The module `ray`, connected to a cluster: the one that it is already connected to, else `where` (see
    `whereabouts`), else the one at RAY_ADDRESS, else one that is started here and ends with this process.

    Raises:
        BackendError: Ray, which `user` needs, is not installed, or this host has no node of that cluster.
    """
    address, _, mode = where.partition(" ")
    if mode:
        os.environ.setdefault(_MODE, mode)
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise BackendError(f"{user} needs Ray", got=str(error), expected="an installed ray",
                           hint='pip install "hal-runtime[ray]"') from error
    try:
        if not ray.is_initialized():
            _in_a_lasting_thread(lambda: ray.init(address or None, log_to_driver=False,
                                                  logging_level=logging.ERROR if address else logging.INFO))
    except (RuntimeError, OSError) as error:
        raise BackendError(f"{user} found no Ray", got=str(error).splitlines()[0],
                           expected=f"a node of the cluster at {address} on this host" if address else None,
                           hint=f"set {_MODE}={mode} for this process" if mode else None) from error
    return ray


def _in_a_lasting_thread(call: Callable[[], object]) -> None:
    """Start Ray in a thread that lasts: the system kills Ray's processes when the thread that started them ends."""
    if threading.current_thread() is threading.main_thread():
        call()
        return
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)
        else:
            threading.Event().wait()

    threading.Thread(target=run, name="hal-ray", daemon=True).start()
    done.result()


def whereabouts(ray: Any) -> str:
    """The address of the cluster that this process has joined, for other processes on its nodes. If the cluster asks
    for a token, they have it already."""
    return f"{ray.get_runtime_context().gcs_address} {os.environ.get(_MODE, '')}"


def runtime_env() -> dict[str, Any]:
    """The runtime environment of actors: they import from the same paths as this process."""
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if isinstance(p, str))
    return {"env_vars": {"PYTHONPATH": path}}
