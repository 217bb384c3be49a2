"""The exit status of a vLLM server whose engine has failed.

vLLM's server answers the requests in flight with an error, stops, and then ends with status 0, as after a normal stop.
Whoever supervises the server would not start it again. So the process of the engine leaves the reason of a failure in
the memory of the server's process, and the server's process looks for one when it exits.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_PATH = "HAL_VLLM_FAILURE"  # names the server's file in memory for the processes that it starts


def watch_for_failure() -> None:
    """End this process with status 1 if a failure is reported before it exits. It acts in the first process of vLLM's
    own program (`vllm serve`, `python -m vllm...`): other programs get vLLM's exceptions, and may go on after them.
    """
    if _PATH in os.environ or not _is_program_of_vllm() or not hasattr(os, "memfd_create"):
        return
    file = os.memfd_create("hal-vllm-failure")
    os.environ[_PATH] = f"/proc/{os.getpid()}/fd/{file}"
    owner = os.getpid()

    def leave() -> None:
        reason = os.pread(file, 1 << 16, 0).decode(errors="replace") if os.getpid() == owner else ""
        if not reason:
            return
        print(f"hal-vllm: exit status 1, since the engine has failed: {reason}", file=sys.stderr, flush=True)
        # An exit handler cannot set the exit status, so the handlers that would come after this one run here. Those
        # that ran before it run once more, as Python has no list of the rest.
        atexit.unregister(leave)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(1)

    atexit.register(leave)


def report_failure(error: BaseException) -> None:
    """Leave the reason for the server's process, which exits with status 1 then. May be called from any thread.

    The first reason stays: to write another in its place would leave none for a moment, in which this process may be
    ended.
    """
    if path := os.environ.get(_PATH):
        try:
            with open(path, "a", encoding="utf-8") as file:
                if not file.tell():
                    file.write(f"{type(error).__name__}: {error}"[:1 << 14])
        except OSError:
            pass  # the server's process has ended before


def fatal(method: Callable[P, R]) -> Callable[P, R]:
    """Report the exceptions of a method that vLLM's engine does not survive."""
    @wraps(method)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            report_failure(error)
            raise
    return reporting


def _is_program_of_vllm() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or (spec is not None and spec.name.split(".")[0] == "vllm")
