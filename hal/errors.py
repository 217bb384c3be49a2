"""One error tree. Every message says what happened, what was got, what was expected and what to do."""

from __future__ import annotations

import os
from typing import ClassVar


class HalError(Exception):
    """Root of every error this library raises on purpose.

    Args:
        what: what happened, one sentence.
        got: the offending value, already readable.
        expected: what would have been right.
        hint: what the reader can do now.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, hint: str | None = None) -> None:
        self.what, self.got, self.expected, self.hint = what, got, expected, hint
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.got is not None:
            parts.append(f"got: {self.got}")
        if self.expected is not None:
            parts.append(f"expected: {self.expected}")
        if self.hint is not None:
            parts.append(f"to do: {self.hint}")
        return "\n  ".join(parts)


class ConfigError(HalError, ValueError):
    """An option, a configuration file or a combination of them is not usable."""


class RequestError(HalError, ValueError):
    """A user's request (prompt, sampling parameters) is refused; other requests are unaffected.

    Attributes:
        param: the name of the parameter at fault; None: it is the prompt, or not one parameter.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, hint: str | None = None,
                 param: str | None = None) -> None:
        super().__init__(what, got=got, expected=expected, hint=hint)
        self.param = param


class LengthError(RequestError):
    """A prompt or text has more tokens than the model or this engine takes."""


class ModelLoadError(HalError):
    """A checkpoint directory is missing, damaged, or of an unsupported architecture."""


class CapacityError(HalError):
    """Memory (weights, KV cache, buffers) cannot hold what was asked for."""


class BackendError(HalError):
    """A backend is unknown, unavailable, or lacks a capability that was asked for."""


class SchemaError(HalError):
    """A declaration of typed inputs is itself wrong (raised when the class is defined)."""


class InputError(HalError, ValueError):
    """A typed input breaks its declaration.

    Attributes:
        field: the field at fault; when two fields disagree and either may be wrong, the first of `fields`.
        fields: every field that takes part in the disagreement.
    """

    def __init__(self, what: str, *, fields: tuple[str, ...], got: object = None, expected: object = None,
                 hint: str | None = None) -> None:
        super().__init__(what, got=got, expected=expected, hint=hint)
        self.fields = fields

    @property
    def field(self) -> str:
        return self.fields[0]


class WireError(HalError):
    """A message is truncated, corrupt, foreign, or of another schema version."""


class GuardError(HalError):
    """Communication was attempted in a phase of the step that forbids it.

    Attributes:
        phase, operation, site: the phase's name, the operation refused, and the caller's "file:line".
    """

    def __init__(self, what: str, *, phase: str, operation: str, site: str, hint: str | None = None) -> None:
        super().__init__(what, got=f"{operation} at {site}", hint=hint)
        self.phase, self.operation, self.site = phase, operation, site


class DeviceError(HalError, RuntimeError):
    """A program does what an accelerator would refuse or get wrong; raised by the fake device (hal.testing.fake).

    Attributes:
        operation, site: the operation, and the caller's "file:line".
    """

    def __init__(self, what: str, *, operation: str, site: str, got: object = None, expected: object = None,
                 hint: str | None = None) -> None:
        super().__init__(what, got=f"{operation} at {site}" + (f": {got}" if got is not None else ""),
                         expected=expected, hint=hint)
        self.operation, self.site = operation, site


class WorkerError(HalError):
    """A rank failed.

    Attributes:
        rank: the rank that failed first, or -1 if it is not known.
        cause: the type name of the original exception; "died" if the process ended without a report; "silent" if it
            gave no sign of life for EngineConfig.heartbeat seconds.
        remote_traceback: the failing rank's traceback as text, or "".
        losses: errors of this process that only said that some other rank is gone.
    """

    losses: ClassVar[int] = 0

    def __init__(self, what: str, *, rank: int, cause: str, remote_traceback: str = "",
                 hint: str | None = None) -> None:
        super().__init__(what, got=cause, hint=hint)
        if rank == -1:
            WorkerError.losses += 1
        self.rank, self.cause, self.remote_traceback = rank, cause, remote_traceback


class NumericsError(HalError, ArithmeticError):
    """The model computed NaN or infinity for a request, which therefore ended; other requests are unaffected.

    Attributes:
        request_id: of the request. position: of the output token that could not be chosen, from 0.
    """

    def __init__(self, what: str, *, request_id: int, position: int, got: object = None, expected: object = None,
                 hint: str | None = None) -> None:
        super().__init__(what, got=got, expected=expected, hint=hint)
        self.request_id, self.position = request_id, position


class StateError(HalError, RuntimeError):
    """Ranks or calls are out of order: a step that was skipped, an epoch that does not match, use after shutdown."""


def in_forked_child(owner: int) -> StateError:
    """The error of an engine's calls in a process that was forked from the engine's owner, the process of this id."""
    return StateError("the engine belongs to the process that made it, and this is a forked child",
                      got=f"process {os.getpid()}", expected=f"process {owner}",
                      hint="make an engine in the child, or send its requests to the parent")
