"""Wire policies: what a step's message holds. All three policies give every rank the same typed input."""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, Protocol, TypeVar

import torch

from hal.contracts.control_plane import ControlPlane
from hal.contracts.inputs import ModelInput, SamplingInput, WorkerInput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.errors import StateError
from hal.profiling import span
from hal.schema import Declared
from hal.schema.layout import HEAD_SIZE
from hal.schema.packed import Buffer
from workers.worker.cache import IDLE

StepInputs = tuple[WorkerInput, ModelInput]
D = TypeVar("D", bound=Declared)
_PLACES = 16  # the slots of a ring up to 8 pipeline stages; beyond that, messages are unpacked anew


class MessageReader(Generic[D]):
    """Unpacks messages that arrive in a few places of memory in turn, as those of a ring do. If a message has the same
    head as the message before it in that place, its tensors are the same views, whose bytes alone are new.
    """

    def __init__(self, kind: type[D], device: torch.device) -> None:
        self.kind, self.device = kind, device
        schema = kind.schema
        self._head = HEAD_SIZE + schema.head.size if device.type == "cpu" and not schema.texts else 0
        self._places: deque[tuple[Buffer, bytes, dict[str, Any]]] = deque(maxlen=_PLACES)

    def __call__(self, buffer: Buffer) -> D:
        """See Declared.from_buffer."""
        head = buffer[:self._head].tobytes()
        for place, last_head, fields in self._places:
            if place is buffer and last_head == head:
                instance = self.kind.__new__(self.kind)
                instance.__dict__.update(fields)
                return instance
        instance = self.kind.from_buffer(buffer, self.device)
        if head:
            self._places.append((buffer, head, dict(instance.__dict__)))
        return instance


class Preparing(Protocol):
    """The methods of a worker that a policy calls."""

    plane: ControlPlane

    def prepare(self, request: ExecuteModelRequest) -> StepInputs:
        """Phase prepare: make this rank's inputs from the request and from the rank's own state."""

    def unpack(self, parts: list[Buffer]) -> StepInputs:
        """The inputs of a step that the driver prepared, on this rank's device."""

    def prepare_sampling(self, sampling: SamplingRequest) -> SamplingInput:
        """As `prepare`, for the second message of the step that was prepared last."""

    def unpack_sampling(self, part: Buffer) -> SamplingInput:
        """As `unpack`, for a second message that the driver prepared."""


class Wire(Protocol):
    def share(self, worker: Preparing, request: ExecuteModelRequest) -> StepInputs:
        """On the rank that has the request: tell the other ranks, and return this rank's inputs."""

    def receive(self, worker: Preparing) -> StepInputs | None:
        """On the other ranks: receive their inputs, or None when there are no more steps."""

    def share_sampling(self, worker: Preparing, sampling: SamplingRequest) -> SamplingInput:
        """On the rank that has it: tell the other ranks, and return the input that completes this rank's step."""

    def receive_sampling(self, worker: Preparing) -> SamplingInput | None:
        """On the other ranks: what completes their step, or None when the engine ends without it."""


class ModelInputWire:
    """The driver prepares. The other ranks receive the step's typed inputs (vLLM's RFC #5552): the model's input, and
    the worker's input unless it is idle."""

    def share(self, worker: Preparing, request: ExecuteModelRequest) -> StepInputs:
        worker_input, model_input = step = worker.prepare(request)
        with span("broadcast"):
            parts = [model_input.to_buffer()]
            if worker_input is not IDLE:
                parts.append(worker_input.to_buffer())
            worker.plane.broadcast(parts)
        return step

    def receive(self, worker: Preparing) -> StepInputs | None:
        with span("receive"):
            parts = worker.plane.receive()
            return worker.unpack(parts) if parts else None

    def share_sampling(self, worker: Preparing, sampling: SamplingRequest) -> SamplingInput:
        made = worker.prepare_sampling(sampling)
        with span("broadcast"):
            worker.plane.broadcast([made.to_buffer()])
        return made

    def receive_sampling(self, worker: Preparing) -> SamplingInput | None:
        with span("receive"):
            parts = worker.plane.receive()
            return worker.unpack_sampling(parts[0]) if parts else None


class RequestWire:
    """The request travels, and every rank prepares for itself. Messages are small, and ranks prepare at the same time.
    """

    def share(self, worker: Preparing, request: ExecuteModelRequest) -> StepInputs:
        with span("broadcast"):
            worker.plane.broadcast([request.to_buffer()])
        return worker.prepare(request)

    def receive(self, worker: Preparing) -> StepInputs | None:
        with span("receive"):
            parts = worker.plane.receive()
        if not parts:
            return None
        request = ExecuteModelRequest.from_buffer(parts[0])
        if request.sampling_follows:  # the message is valid until the next one, which completes the step
            request = ExecuteModelRequest.from_buffer(parts[0].copy())
        return worker.prepare(request)

    def share_sampling(self, worker: Preparing, sampling: SamplingRequest) -> SamplingInput:
        with span("broadcast"):
            worker.plane.broadcast([sampling.to_buffer()])
        return worker.prepare_sampling(sampling)

    def receive_sampling(self, worker: Preparing) -> SamplingInput | None:
        with span("receive"):
            parts = worker.plane.receive()
        return worker.prepare_sampling(SamplingRequest.from_buffer(parts[0])) if parts else None


class NoWire:
    """Nothing travels: every rank has a scheduler of its own that gives it the request. A single rank is the simplest
    case."""

    def share(self, worker: Preparing, request: ExecuteModelRequest) -> StepInputs:
        return worker.prepare(request)

    def receive(self, worker: Preparing) -> StepInputs | None:
        raise StateError("with wire='none' no rank is told what to do", hint="call execute_model on every rank")

    def share_sampling(self, worker: Preparing, sampling: SamplingRequest) -> SamplingInput:
        return worker.prepare_sampling(sampling)

    def receive_sampling(self, worker: Preparing) -> SamplingInput | None:
        raise StateError("with wire='none' no rank is told what to sample", hint="call sample on every rank")


WIRES: dict[str, Wire] = {"model-input": ModelInputWire(), "request": RequestWire(), "none": NoWire()}
