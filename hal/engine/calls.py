"""One call at a time changes an engine. After a call that was interrupted, no call changes it before `restart`.

A signal handler may raise between any two instructions, so no code that changes several things can undo them all. The
rule here needs no undoing. A call takes hold of the engine in one operation, and lets go of it in one operation when
all its changes are made. A call that ends by an exception never lets go, so the next call is refused. `restart` builds
the engine's state again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from threading import get_ident
from types import TracebackType

from hal.errors import HalError, StateError, WorkerError, in_forked_child
from hal.guard import leave_all

_RESTART = "restart() makes new workers, and unfinished requests go on from the tokens that they have"


class Call:
    """A call that holds the engine until its `with` block ends without an exception.

    Args:
        reads: the call changes nothing, so it lets go after an exception too.

    Attributes:
        thread: the thread that made the call.
        refusal: makes the error that later calls get; None while the call runs.
    """

    __slots__ = ("_calls", "_reads", "refusal", "thread")

    def __init__(self, calls: Calls, reads: bool) -> None:
        self._calls, self._reads = calls, reads
        self.thread = get_ident()
        self.refusal: Callable[[], HalError] | None = None

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is not None and not self._reads:
            self.refusal = _consequence(error)
        elif self._calls.held.get("by") is self:  # otherwise a signal handler has shut the engine down in the meantime
            self._calls.held.clear()


class Calls:
    """The calls of one engine.

    Attributes:
        held: {"by": call} while a call holds the engine. A dictionary, since `setdefault` tests and sets in one
            operation, which neither a signal nor another thread divides.
    """

    def __init__(self) -> None:
        self.held: dict[str, Call] = {}
        self._process = os.getpid()

    @property
    def idle(self) -> bool:
        return not self.held

    @property
    def ended(self) -> bool:
        """An earlier call ended by an exception, or the engine is shut down."""
        holder = self.held.get("by")
        return holder is not None and holder.refusal is not None

    @property
    def refusal(self) -> HalError | None:
        """The error that every call gets since an earlier one ended by an exception, or since the engine is shut down.
        """
        holder = self.held.get("by")
        return None if holder is None or holder.refusal is None else holder.refusal()

    def begin(self, *, reads: bool = False) -> Call:
        """Hold the engine.

        Raises:
            WorkerError: a rank failed in an earlier call. StateError: an earlier call was interrupted, another thread
            is in a call, or the engine is shut down.
        """
        call = Call(self, reads)
        holder = self.held.setdefault("by", call)
        if holder is not call:
            raise _refusal(holder)
        return call

    def begin_anew(self) -> Call:
        """Hold the engine whatever ended the calls before. Raises StateError: another thread is in a call."""
        self.refuse_other_threads()
        leave_all()
        call = self.held["by"] = Call(self, reads=False)
        self._process = os.getpid()
        return call

    def shut_down(self) -> None:
        """Refuse all calls but `begin_anew`. Raises StateError: another thread is in a call."""
        self.refuse_other_threads()
        if self.ended:  # not in every shutdown: code of another engine's step may end this one
            leave_all()
        call = Call(self, reads=False)
        call.refusal = partial(StateError, "the engine is shut down", hint="make a new LLM, or call restart()")
        if os.getpid() != self._process:
            call.refusal = partial(in_forked_child, self._process)
        self.held["by"] = call

    def refuse_other_threads(self) -> None:
        holder = self.held.get("by")
        if holder is not None and holder.refusal is None and holder.thread != get_ident():
            raise _refusal(holder)


def _consequence(error: BaseException) -> Callable[[], HalError]:
    """A function that makes the error of later calls. It makes a new error each time: a raised error keeps the frames
    that it passed through, and with them the memory of the failed step and of the caller."""
    if isinstance(error, WorkerError):
        hint = f"{error.hint}; {_RESTART}" if error.hint else _RESTART
        return partial(WorkerError, error.what, rank=error.rank, cause=error.cause,
                       remote_traceback=error.remote_traceback, hint=hint)
    if isinstance(error, StateError):  # such as the executor's error in a forked child, whose text says what to do
        return partial(StateError, error.what, got=error.got, expected=error.expected, hint=error.hint or _RESTART)
    text = error.what if isinstance(error, HalError) else str(error)
    return partial(StateError, "an exception ended an earlier call in the middle, so the engine's state is in doubt",
                   got=f"{type(error).__name__}: {text}" if text else type(error).__name__, hint=_RESTART)


def _refusal(holder: Call) -> HalError:
    if holder.refusal is not None:
        return holder.refusal()
    if holder.thread != get_ident():
        return StateError("LLM is not thread-safe, and another thread is in a call of this one", expected="one call at "
                          "a time", hint="call it from one thread, or hold a lock around each call")
    return StateError("an earlier call of this thread has not ended: an exception interrupted it, or this call was "
                      "made from within it (by a signal handler, say)", hint=_RESTART)
