"""Named spans of a step, in torch.profiler's traces and in those of a device's own profiler.

Spans are off, at almost no cost, unless HAL_PROFILE=1 is in the environment when this is imported (worker processes
inherit it) or `trace` runs. Importing this loads no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


class _Nothing:
    __slots__ = ()
    # A builtin that takes what it is given and returns what is false makes no frame: 0.07 us instead of 0.11.
    __enter__ = __exit__ = staticmethod("".format)


_on = os.environ.get("HAL_PROFILE") == "1"
_NOTHING: Any = _Nothing()
_seconds: dict[str, float] | None = None  # by name of a span, where `timed` runs
_marks: list[Callable[[str], AbstractContextManager[object]]] = []


def mark_with(mark: Callable[[str], AbstractContextManager[object]]) -> None:
    """Spans of this process open `mark(name)` as well: a range in the traces of the device's own profiler. A backend
    calls this when it makes its device current; another call with the same function changes nothing."""
    if mark not in _marks:
        _marks.append(mark)


def span(name: str) -> AbstractContextManager[object]:
    """Context manager: the block is `name` to a profiler. Spans nest; one belongs to the thread that opens it.

    A step's: prepare; broadcast, or receive on the ranks that are told; execute, and sample within it (not where a
    graph of the device samples too); fetch, the driver's wait for the output.
    """
    return _open(name) if _on else _NOTHING


@contextmanager
def _open(name: str) -> Iterator[None]:
    if _seconds is not None:
        start = time.perf_counter()
        yield
        _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - start
        return
    import torch

    with torch.profiler.record_function(name), ExitStack() as ranges:
        for mark in _marks:
            ranges.enter_context(mark(name))
        yield


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Context manager: the seconds that this process spends in the block's spans, by name. No profiler runs."""
    global _on, _seconds
    before, _on, _seconds = (_on, _seconds), True, {}
    try:
        yield _seconds
    finally:
        _on, _seconds = before


@contextmanager
def trace(path: str) -> Iterator[None]:
    """Context manager: write what this process does in the block, its spans among it, to `path`: a Chrome trace, of the
    host and of the devices that torch.profiler knows. Raises OSError; what was at `path` then stays as it was."""
    global _on
    from pathlib import Path

    import torch

    from hal import files

    before, _on = _on, True
    try:
        with torch.profiler.profile() as profile:
            yield
    finally:
        _on = before
    with files.replacing(Path(path)) as temporary:
        profile.export_chrome_trace(str(temporary))
