"""Log records whose handler communicates (over a socket, a pipe, a store) in a phase that forbids it."""

from __future__ import annotations

import functools
import logging
import sys
import weakref

from hal.errors import GuardError
from hal.guard.patch import Patches


def patch_logging(patches: Patches) -> None:
    """Report a refused handler once. The package logging never raises from a log call: it prints a traceback for each
    record that a handler cannot send. Here the handler is named once, and its other records in a phase are dropped
    silently."""
    handle_error = logging.Handler.handleError
    told: weakref.WeakSet[logging.Handler] = weakref.WeakSet()

    @functools.wraps(handle_error)
    def say_once(self: logging.Handler, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, GuardError):
            handle_error(self, record)
        elif self not in told and logging.raiseExceptions and sys.stderr is not None:
            told.add(self)
            print(f"hal.guard: {type(self).__name__} communicates, which phase {error.phase} forbids "
                  f"({error.operation} at {error.site}): the records that it is given in prepare and execute are "
                  "dropped. Use a handler that writes to a file, a stream or a queue.Queue there.", file=sys.stderr)

    patches.replace(logging.Handler, "handleError", say_once)
