"""Signals that end a command. It ends as after Ctrl-C, together with its worker processes, and prints one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal is gone"}


@contextmanager
def raised_once() -> Iterator[list[signal.Signals]]:
    """Context manager: the first of these signals raises KeyboardInterrupt in the main thread, and is appended to the
    list that the manager returns. A second signal ends the process at once, even while the interpreter ends. A signal
    that the process ignores stays ignored."""
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # Python sets handlers in the main thread only
        for each in WORDS:
            handler = signal.getsignal(each)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                before[each] = handler
        for each in before:
            signal.signal(each, stop)
    try:
        yield received
    finally:
        if not received:
            for each, handler in before.items():
                signal.signal(each, handler)


__all__ = ["WORDS", "raised_once"]
