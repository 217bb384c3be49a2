"""The phases of a step, and the ContextVar that holds the phase of a context."""

from __future__ import annotations

import sys
from contextvars import ContextVar, Token
from enum import Enum
from types import FrameType
from typing import Final

from hal.errors import GuardError


class Phase(str, Enum):
    """The communication that a phase allows. PREPARE: none. EXECUTE: only through the injected Communicator. WORKER:
    any."""

    PREPARE = "prepare"
    EXECUTE = "execute"
    WORKER = "worker"

    __str__ = str.__str__  # one spelling in messages on every Python version


class Region:
    """A phase, or an exception from it, that a context is in. `open` says whether communication may pass. It is None
    when the region has ended.

    A thread or an asyncio task may hold a copy of a context after the region has ended. Such a copy counts as being in
    the enclosing region.
    """

    __slots__ = ("_token", "open", "phase", "rank")
    phase: Phase
    rank: int
    open: bool | None
    _token: Token[Region | None] | None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        token = self._token
        if token is not None:
            self.open = None
            _reset(token)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.phase.value} rank={self.rank} open={self.open}>"


STATE: Final[ContextVar[Region | None]] = ContextVar("hal.guard", default=None)
# The call site that started the work of a helper thread; errors name it when the thread itself has no user frame.
ORIGIN: Final[ContextVar[str | None]] = ContextVar("hal.guard.origin", default=None)
# A step enters three phases. These bound names save 0.15 us of each; the lookup of an enum's member is slow before
# Python 3.12.
_set, _reset, _WORKER = STATE.set, STATE.reset, Phase.WORKER


class phase(Region):
    """Context manager: this context is in phase `phase` of a step of rank `rank`.

    Phases nest. Leaving a phase restores the one before it, also when an exception passes. Enter an object only once.
    """

    __slots__ = ()

    def __init__(self, phase: Phase, rank: int = 0) -> None:
        self.phase = phase
        self.rank = rank
        self.open = phase is _WORKER

    def __enter__(self) -> Region:
        self._token = _set(self)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.open = None
        _reset(self._token)  # type: ignore[arg-type]  # a phase always has a token


class _Opening(Region):
    __slots__ = ("_label",)

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        outer = current()
        if outer is None or outer.open:
            self._token = None
            return
        self._check(outer)
        self.phase, self.rank, self.open = outer.phase, outer.rank, True
        self._token = _set(self)

    def _check(self, outer: Region) -> None:
        pass


class data_plane(_Opening):
    """Context manager for Communicator implementations: the block performs the data-plane operation `op`.

    Raises:
        GuardError: the context is in PREPARE, which has no communication of any kind.
    """

    __slots__ = ()

    def _check(self, outer: Region) -> None:
        if outer.phase is Phase.PREPARE:
            refuse(self._label)


class allow(_Opening):
    """Context manager: communication may pass in any phase. `reason` tells readers of the code why.

    Use it for a debugging hook, a profiler or a metric. If a step needs it to be correct, the code is in the wrong
    phase.

    Raises:
        ValueError: `reason` is blank.
    """

    __slots__ = ()

    def __init__(self, reason: str) -> None:
        if not reason.strip():
            raise ValueError("allow() needs a reason, for the next reader of this exception to the rule")
        super().__init__(reason)


def leave_all() -> None:
    """Leave every phase that this context is in. A signal handler that raises between two instructions of a `with`
    statement can leave the context in a phase whose block has ended."""
    _set(None)


def current() -> Region | None:
    """The region that this context is in (`.phase`, `.rank`, `.open`), or None outside any phase."""
    region = STATE.get()
    while region is not None and region.open is None:
        token = region._token
        outer = token.old_value if token is not None else None
        region = outer if isinstance(outer, Region) else None
    return region


def check(operation: str) -> None:
    """Check communication that no patch sees, such as shared memory. The code calls this before it communicates.

    Raises:
        GuardError: this context's phase forbids it.
    """
    region = STATE.get()
    if region is not None and not region.open:
        refuse(operation)


_HINTS: Final = {
    Phase.PREPARE: "compute it from the request on every rank, or move it to the worker (between prepare and execute)",
    Phase.EXECUTE: "use the Communicator that the worker injected, or move it to the worker (before or after execute)",
}
_RULES: Final = {
    Phase.PREPARE: "prepare has no communication of any kind",
    Phase.EXECUTE: "execute communicates only through the injected Communicator",
}


def refuse(operation: str) -> None:
    """Refuse an operation. A patched operation calls this before it runs in a region that is not open.

    Raises:
        GuardError: the region has not ended. (It may have ended in a context that was copied into a longer task.)
    """
    region = current()
    if region is None or region.open or _wakes_event_loop():
        return
    site, public = caller()
    raise GuardError(
        f"communication in phase {region.phase.value} of rank {region.rank}: {_RULES[region.phase]}",
        phase=region.phase.value,
        operation=public or operation,
        site=site,
        hint=_HINTS[region.phase] + "; if it must be here, wrap it in hal.guard.allow(reason)",
    )


def _wakes_event_loop() -> bool:
    """Whether asyncio is waking its own loop through its self-pipe. This carries no data, and a loop that cannot do it
    hangs."""
    frame = sys._getframe(2).f_back  # above this, refuse() and the operation
    if frame is None or frame.f_code.co_name not in ("_write_to_self", "_read_from_self"):
        return False
    return frame.f_globals.get("__name__") == "asyncio.selector_events"


# Frames of these modules are not the user's: a refused collective names the line of the runner that called it. They are
# known by module name, not by path: code that inductor generates counts as torch's.
_MACHINERY: Final = sys.stdlib_module_names | {"torch", "torch_xla", "ray", "typing_extensions"}
_OWN: Final = ("hal.guard", "hal.testing.fake", "hal.contracts.communicator", "workers.data", "workers.control",
               "workers.links")


def caller() -> tuple[str, str | None]:
    """The first frame outside the guard, the fake device, torch and the standard library as "file:line", and the
    public function of torch.distributed that it called on the way here, if any."""
    public: str | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, module = frame.f_code, str(frame.f_globals.get("__name__", ""))
        # Code without a module was generated (by torch.fx or AOTAutograd).
        if module and module.partition(".")[0] not in _MACHINERY and not module.startswith(_OWN):
            return f"{code.co_filename}:{frame.f_lineno}", public
        if module.startswith("torch.distributed") and code.co_name[0] not in "_<" and code.co_name != "wrapper":
            public = f"{module.replace('.distributed_c10d', '')}.{code.co_name}"
        frame = frame.f_back
    return ORIGIN.get() or "<no Python caller>", public
