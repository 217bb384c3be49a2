"""The standard streams: which of them are open, and writing to a stream that may be closed or full."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import sys
import traceback
from typing import TextIO

from hal.errors import ConfigError, HalError, WorkerError


def fill() -> None:
    """Open the null device for each standard stream that is closed. Otherwise the next file or socket that is opened
    gets the stream's descriptor, and the output of a library is written into it.

    Raises:
        ConfigError: the standard output is closed, or not open for writing, so nobody could see a result.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    if "stderr" in closed:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # it lives as long as the process
    if "stdout" in closed:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise ConfigError("the standard output is closed", hint="redirect it to a file, or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # a stream that stands for one in a test has no descriptor
            if fcntl.fcntl(sys.stdout.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise ConfigError("the standard output is not open for writing", hint="redirect it with >, not with <")
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters of the text


def complain(error: HalError, *, with_traceback: bool = False) -> None:
    """Write an error to the standard error, if that stream can be written."""
    lines = [f"hal: error: {error}"]
    if with_traceback:
        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
        if isinstance(error, WorkerError) and error.remote_traceback:
            lines.insert(1, f"on rank {error.rank}:\n{error.remote_traceback}")
    say("\n".join(lines))


def say(text: str) -> None:
    """Write a line to the standard error, if that stream can be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        forget(sys.stderr)


def forget(stream: TextIO) -> None:
    """Discard what is left in a stream that can no longer be written, so that the interpreter's last flush works."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reader_is_gone() -> bool:
    """Whether the standard output is a pipe or socket without a reader."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except OSError:
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def takes_all_characters() -> bool:
    """Whether the standard output is written in UTF-8."""
    return (sys.stdout.encoding or "").lower().replace("_", "-") in ("utf-8", "utf8")


__all__ = ["complain", "fill", "forget", "reader_is_gone", "say", "takes_all_characters"]
