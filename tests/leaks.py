"""What a test may not leave behind for those that run after it in the same process."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

# Helpers of Python, Ray and torch.compile, which serve a process to its end.
_STAY = ("resource_tracker", "forkserver", "/ray/", "ray::", "compile_worker")
_GRACE = 30.0  # seconds in which a process that a test has ended may go, on a loaded machine too


def state() -> dict[str, Any]:
    """By name, what has to be after a test as it was before it."""
    from hal.guard.state import current

    found = {"the guard's phase": current(), "HAL_* of the environment": {
        name: value for name, value in os.environ.items() if name.startswith("HAL_")}}
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "compile"):  # imported as a whole
        found |= {"torch's default dtype": torch.get_default_dtype(), "torch's threads": torch.get_num_threads(),
                  "torch's grad mode": torch.is_grad_enabled(), "torch's inference mode":
                  torch.is_inference_mode_enabled(), "torch's deterministic algorithms":
                  torch.are_deterministic_algorithms_enabled()}
    return found


def restore(before: dict[str, Any]) -> None:
    """So that the tests after it do not fail as well."""
    from hal.guard.state import STATE

    STATE.set(before["the guard's phase"])
    for name in [name for name in os.environ if name.startswith("HAL_")]:
        del os.environ[name]
    os.environ.update(before["HAL_* of the environment"])
    torch: Any = sys.modules.get("torch")
    if "torch's threads" in before:
        torch.set_default_dtype(before["torch's default dtype"])
        torch.set_num_threads(before["torch's threads"])
        torch.set_grad_enabled(before["torch's grad mode"])
        torch.use_deterministic_algorithms(before["torch's deterministic algorithms"])


def changes(before: dict[str, Any], children: dict[str, str]) -> list[str]:
    """A line for each thing that a test has left; `before` and `children` are of the time before it."""
    now = state()
    lines = [f"{name}: {value!r} before the test, {now[name]!r} after it"
             for name, value in before.items() if now[name] != value]
    end = time.monotonic() + _GRACE
    while (left := new_children(children)) and time.monotonic() < end:
        time.sleep(0.05)
    return lines + [f"process {pid}: {words}" for pid, words in left.items()]


def new_children(before: dict[str, str]) -> dict[str, str]:
    import forked

    return {pid: words for pid, words in children().items() if pid not in {*before, forked.stays()} and words
            and not any(word in words for word in _STAY)}


def children() -> dict[str, str]:
    """By process id, the command of each child process; "" of one that has ended. Empty where the kernel does not
    tell."""
    found = {}
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            for pid in path.read_text().split():
                with contextlib.suppress(OSError):  # a process that another thread has waited for meanwhile
                    words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
                    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
                    ended = stat.rpartition(")")[2].split()[0] in "ZX"
                    found[pid] = words or ("" if ended else "that only just begins")
    return found
