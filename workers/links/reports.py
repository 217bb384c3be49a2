"""What a worker process tells the driver: JSON lines, nothing pickled. Above all: why it failed."""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hal import errors
from hal.errors import HalError, WorkerError

_PLAIN = ("ConfigError", "RequestError", "ModelLoadError", "CapacityError", "BackendError", "SchemaError", "WireError",
          "StateError")  # those whose arguments are HalError's


@dataclass(frozen=True, slots=True)
class Failure:
    """Attributes:
        cause: the exception's type, or "died", or "silent".
        what, got, expected, hint: of a HalError; of another exception `what` alone, its text.
        step: the step it happened in, or "".
        lost: the rank only found others gone, so the first failure is elsewhere.
    """

    rank: int
    cause: str
    what: str
    got: str | None = None
    expected: str | None = None
    hint: str | None = None
    traceback: str = ""
    step: str = ""
    lost: bool = False

    @classmethod
    def of(cls, rank: int, error: BaseException, step: str = "", losses: int = 0) -> Failure:
        """`losses`: WorkerError.losses when the engine began."""
        text = "".join(traceback.format_exception(error))
        lost = any(isinstance(e, WorkerError) and e.rank == -1 for e in chain(error))
        if not isinstance(error, HalError):
            # A library whose compiled program called the Communicator (XLA) raises the text of its error alone.
            lost = lost or WorkerError.losses > losses
            return cls(rank, type(error).__name__, str(error), traceback=text, step=step, lost=lost)
        got, expected = (None if v is None else str(v) for v in (error.got, error.expected))
        return cls(rank, type(error).__name__, error.what, got, expected, error.hint, text, step, lost)

    @classmethod
    def death(cls, rank: int, status: int | str | None) -> Failure:
        how = status if isinstance(status, str) else ""
        if isinstance(status, int):
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        hint = "it may have been out of memory: see the system's log" if status == -9 else None
        return cls(rank, "died", how or "its connection closed", hint=hint)

    @classmethod
    def silence(cls, rank: int, seconds: float) -> Failure:
        return cls(rank, "silent", f"no sign of life for {seconds:g} s",
                   hint="its process is stopped, or waits for memory or the processor; else raise `heartbeat`")

    def at_start(self) -> HalError:
        """The same error as on that rank where the library has one, which names what the user can change."""
        if self.cause in _PLAIN:
            kind: type[HalError] = getattr(errors, self.cause)
            return kind(f"rank {self.rank}: {self.what}", got=self.got, expected=self.expected, hint=self.hint)
        return self._worker_error("while it started")

    def in_step(self) -> WorkerError:
        return self._worker_error(f"in {self.step}" if self.step else "between steps")

    def _worker_error(self, when: str) -> WorkerError:
        what = f"rank {self.rank} {'died' if self.cause == 'died' else 'failed'} {when}: {self.what}"
        what += f"; got {self.got}" if self.got else ""
        what += f"; expected {self.expected}" if self.expected else ""
        return WorkerError(what, rank=self.rank, cause=self.cause, remote_traceback=self.traceback, hint=self.hint)


class FailureListeners:
    """Functions that are told the first failure of a rank, each one once, whichever thread finds it."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[WorkerError], None]] = deque()
        self._error: WorkerError | None = None

    def add(self, listener: Callable[[WorkerError], None]) -> None:
        self._waiting.append(listener)
        if self._error is not None:
            self.tell(self._error)

    def tell(self, error: WorkerError) -> None:
        self._error = self._error or error
        while self._waiting:
            try:
                listener = self._waiting.popleft()  # one operation, so that no two threads call the same listener
            except IndexError:
                return
            try:
                listener(self._error)
            except Exception:  # the thread that watches the ranks must go on
                logging.getLogger(__name__).exception("a listener to the failure of a rank failed itself")


def chain(error: BaseException | None) -> list[BaseException]:
    """An error, what caused it, and so on."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
