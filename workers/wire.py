"""What crosses the control plane in a step: three policies that end in the same typed input on every rank."""

from __future__ import annotations

from typing import Protocol

from hal.control import ControlPlane
from hal.errors import StateError
from hal.inputs import ModelInput, WorkerInput
from hal.request import ExecuteModelRequest

Step = tuple[WorkerInput, ModelInput]


class Preparing(Protocol):
    """What a policy needs of a worker."""

    plane: ControlPlane

    def prepare(self, request: ExecuteModelRequest) -> Step:
        """Phase prepare: this rank's step, made from the request and from what this rank keeps."""

    def decode(self, parts: list[object]) -> Step:
        """A step that the driver prepared, moved to this rank's device."""


class Wire(Protocol):
    def share(self, worker: Preparing, request: ExecuteModelRequest) -> Step:
        """On the rank that has the request: this rank's step, the other ranks having been told."""

    def receive(self, worker: Preparing) -> Step | None:
        """On the other ranks: their step, or None when there are no more."""


class ModelInputWire:
    """The driver prepares; the others receive the step's typed inputs (vLLM's RFC #5552)."""

    def share(self, worker: Preparing, request: ExecuteModelRequest) -> Step:
        step = worker.prepare(request)
        worker.plane.broadcast([part.encode() for part in step])
        return step

    def receive(self, worker: Preparing) -> Step | None:
        parts = worker.plane.receive()
        return worker.decode(list(parts)) if parts else None


class RequestWire:
    """The request travels, and every rank prepares for itself: fewer bytes, and ranks prepare at the same time."""

    def share(self, worker: Preparing, request: ExecuteModelRequest) -> Step:
        worker.plane.broadcast([request.encode()])
        return worker.prepare(request)

    def receive(self, worker: Preparing) -> Step | None:
        parts = worker.plane.receive()
        return worker.prepare(ExecuteModelRequest.decode(parts[0])) if parts else None


class NoWire:
    """Every rank is called with the request by a scheduler of its own. A world of one is the simplest case."""

    def share(self, worker: Preparing, request: ExecuteModelRequest) -> Step:
        return worker.prepare(request)

    def receive(self, worker: Preparing) -> Step | None:
        raise StateError("with wire='none' no rank is told what to do", hint="call execute_model on every rank")


WIRES: dict[str, Wire] = {"model-input": ModelInputWire(), "request": RequestWire(), "none": NoWire()}
