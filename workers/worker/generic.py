"""The worker of every device: a runner, its KV cache, and the checks between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from hal.config import WorkerConfig
from hal.contracts.backend import Backend, in_host_memory
from hal.contracts.block_moves import MOVES, load_adapters, moves_blocks
from hal.contracts.communicator import Communicator
from hal.contracts.control_plane import ControlPlane
from hal.contracts.inputs import IntermediateTensors, ModelInput, SamplingInput, WorkerInput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.contracts.runner import ModelRunnerBase, Progress, no_progress
from hal.errors import BackendError, ConfigError, SchemaError, StateError
from hal.features.adapter import LOADS
from hal.schema import Declared
from hal.schema.packed import Buffer
from hal.speculation.rounds import measured_rounds
from hal.speculation.runner import compose
from workers.worker.base import LocalOrDistributedWorkerBase
from workers.worker.cache import IDLE, CacheEngine, count_blocks
from workers.worker.consistency import schemas_of
from workers.worker.wire_policy import MessageReader, StepInputs

D = TypeVar("D", bound=Declared)


class Worker(LocalOrDistributedWorkerBase):
    """The worker of every device. All code of a device is in its Backend and its ModelRunnerBase.

    Attributes:
        runner, device: the runner and device of the backend. cache: the KV cache on the device, and its host blocks.
    """

    device: torch.device
    runner: ModelRunnerBase[Any]
    cache: CacheEngine

    def __init__(self, config: WorkerConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        self.strict = os.environ.get("HAL_STRICT") == "1"
        self._links: list[ControlPlane | Communicator] = []
        self.flight_recorder: Any = None
        if os.environ.get("HAL_RECORD_ON_ERROR"):
            from hal.recording.record import FlightRecorder

            self.flight_recorder = FlightRecorder(os.environ["HAL_RECORD_ON_ERROR"], config, backend)

    def init_device(self) -> torch.device:
        rank, engine = self.topology.rank, self.config.engine
        if engine.executor == "ray":
            rank = 0  # Ray shows each process its own device
        elif engine.wire == "none":
            rank = int(os.environ.get("LOCAL_RANK", rank))
        self.device = self.backend.device(rank)
        return self.device

    def connect(self, plane: ControlPlane, communicator: Communicator) -> None:
        self.plane, self.communicator = plane, communicator
        self._links = [plane, communicator]
        runner = self.backend.make_runner(self.config, self.device, communicator)
        self.runner = compose(runner, self.config, self.device, communicator)
        require_types(self.runner)
        self.two_phase, self.multi_step = self.runner.two_phase, self.runner.multi_step
        steps = self.config.engine.steps_per_message
        try:
            if steps != 1:
                require_steps(self.runner, steps)
        except (ConfigError, SchemaError):
            if steps != "auto":
                raise
            self.multi_step = False  # the scheduler then gives one step to a message

    def load_model(self, progress: Progress = no_progress) -> None:
        self.runner.load_model(progress)
        if self.config.engine.speculate is not None and self.runner.has_row_states:
            raise ConfigError("a state per row cannot be taken back when a draft is rejected",
                              got=f"speculate={self.config.engine.speculate!r} with layers that keep such a state",
                              expected="a model of paged caches alone", hint="speculate=None")
        self.input_type, self.output_type = self.runner.input_type, self.runner.output_type
        self.tokens_per_row = self.runner.tokens_per_row
        self._read = MessageReader(self.input_type, self.device)

    def facts(self) -> dict[str, str]:
        handed_on = self.runner.intermediate_type
        kinds = self.input_type, self.output_type, *([] if handed_on is None else [handed_on])
        return {"tokens_per_row": str(self.tokens_per_row)} | schemas_of(*kinds)

    def determine_num_blocks(self) -> int:
        on_host = in_host_memory(self.backend, self.device)
        free = self.backend.free_memory(self.device) // (self.topology.world_size if on_host else 1)
        return count_blocks(self.config, free=free, reserve=self.runner.reserve_bytes(),
                            per_block=self.runner.kv_bytes_per_block(), host_memory=on_host,
                            row_states=self.runner.has_row_states)

    @property
    def kv_bytes_per_block(self) -> int:
        return self.runner.kv_bytes_per_block()

    def initialize_cache(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        kept = num_blocks if self.runner.kv_bytes_per_block() else 0
        self.cache = CacheEngine(self.runner.make_kv_caches(num_blocks), kept, self.runner)

    @property
    def has_row_states(self) -> bool:
        return self.runner.has_row_states

    def expert_loads(self) -> np.ndarray[Any, Any] | None:
        return self.runner.expert_loads()

    def warmup(self, progress: Progress = no_progress) -> None:
        self.runner.warmup(self.cache.device, progress)
        if self.config.engine.speculate is not None and self.topology.pp == 1:
            self.round_times = measured_rounds(self.runner, self.cache.device)
        self.cache.reserve_host(self.config.engine.num_cpu_blocks, self.backend.runtime)
        self.backend.runtime.synchronize(self.device)

    def prepare_worker_input(self, request: ExecuteModelRequest) -> WorkerInput:
        loads = request["adapters_to_load"] is not None
        if not (request.sampling_follows or loads or moves_blocks(request)):
            return IDLE
        return self._checked(WorkerInput(sampling_follows=request.sampling_follows,
                                         **{name: request[name] for name in (*MOVES, *(LOADS if loads else ()))}))

    def prepare_model_input(self, request: ExecuteModelRequest) -> ModelInput:
        model_input: ModelInput = self._checked(self.runner.prepare_model_input(request))
        return model_input

    def unpack(self, parts: list[Buffer]) -> StepInputs:
        self.steps, self.model_input = self.steps + 1, None
        # An unpacked message has the declared structure, which follows from the declaration and the sizes in the head.
        worker_input = WorkerInput.from_buffer(parts[1]) if len(parts) > 1 else IDLE
        if worker_input.sampling_follows:  # the message is valid until the next one, which completes the step
            model_input = self.runner.input_type.from_buffer(parts[0].copy(), self.device)
        else:
            model_input = self._read(parts[0])
        step = worker_input, model_input
        if self.strict:
            for part in step:
                part.check()
        return step

    def prepare_sampling_input(self, sampling: SamplingRequest) -> SamplingInput:
        return self._checked(self.runner.prepare_sampling_input(sampling))

    def unpack_sampling(self, part: Buffer) -> SamplingInput:
        return SamplingInput.from_buffer(part, self.device)

    def join(self, model_input: ModelInput, sampling: SamplingInput) -> None:
        model_input.join(sampling)
        self._checked(model_input)

    def execute_worker(self, worker_input: WorkerInput) -> None:
        if self.flight_recorder is not None:
            self.flight_recorder.moved(worker_input, self.num_blocks)
        self.cache.apply(worker_input)
        load_adapters(worker_input, self.runner)

    def receive_intermediate(self, model_input: ModelInput) -> IntermediateTensors:
        kind = self.runner.intermediate_type
        if kind is None:
            raise StateError(f"{type(self.runner).__name__} declares no tensors between pipeline stages",
                             expected="intermediate_type, set by load_model")
        return self._checked(self.communicator.recv(kind, model_input.dims))

    def execute_runner(self, model_input: ModelInput, intermediate: IntermediateTensors | None,
                       sampling_follows: bool) -> Any:
        run = self.runner.execute_forward if sampling_follows else self.runner.execute_model
        try:
            if self.flight_recorder is not None:
                self.flight_recorder.began(model_input, self.runner)
            output = run(model_input, self.cache.device, intermediate)
            if self.flight_recorder is not None:
                self.flight_recorder.took(output)
        except Exception as error:
            if self.flight_recorder is not None:
                self.flight_recorder.save(self.steps, error)
            raise
        if isinstance(output, IntermediateTensors):
            self._checked(output)
            dims = model_input.dims
            if any(dims.get(symbol, size) != size for symbol, size in output.dims.items()):
                raise StateError(f"{type(output).__name__} is of another size than the step", got=output.dims,
                                 expected=dims)  # the next stage would wait for bytes that never come
        return output

    def execute_sampling(self, forwarded: Any, model_input: ModelInput) -> Any:
        try:
            if self.flight_recorder is not None:
                self.flight_recorder.joined(model_input)
            return self.runner.execute_sampling(forwarded, model_input)
        except Exception as error:
            if self.flight_recorder is not None:
                self.flight_recorder.save(self.steps, error)
            raise

    def fetch(self, output: Any) -> Callable[[], Declared]:
        take, communicator, wanted = self.runner.fetch(output), self.communicator, self.output_type

        def result() -> Declared:
            fetched: Declared = take()
            communicator.check()
            if not isinstance(fetched, wanted):
                raise StateError(f"{type(self.runner).__name__}.fetch gave something else than the step's output",
                                 got=type(fetched).__name__, expected=wanted.__name__)
            return fetched

        return result

    def shutdown(self) -> None:
        self.forwarded = None
        self.cache = CacheEngine([], 0)  # its memory goes, even while somebody still holds this worker,
        self.__dict__.pop("runner", None)  # and so do the weights, and graphs, for whose end an abort of groups waits
        for link in self._links:
            link.close()
        self._links = []

    def describe_step(self) -> str:
        text = f"step {self.steps}"
        if self.model_input is not None:
            try:
                dims = ", ".join(f"{k}={v}" for k, v in self.model_input.dims.items() if v)
                text += f" ({type(self.model_input).__name__} of {dims}; crc {self.model_input.checksum():08x})"
            except Exception as error:  # a description must not hide what is described
                text += f" (its input cannot be described: {error})"
        return text + (self.flight_recorder.note if self.flight_recorder is not None else "")

    def _checked(self, value: D) -> D:
        """Check the structure, and under HAL_STRICT=1 the meaning too. Raises InputError."""
        value.validate(None if isinstance(value, WorkerInput) else self.device)
        if self.strict:
            value.check()
        return value


def require_steps(runner: ModelRunnerBase[Any], steps: int | str) -> None:
    """Whether the runner takes several decode steps for one message.

    Raises:
        ConfigError: it does not. SchemaError: an array of its input declares no rule by which it advances.
    """
    if not runner.multi_step or runner.tokens_per_row > 1:
        raise ConfigError(f"{type(runner).__name__} does not take several decode steps for one message",
                          got=f"steps_per_message={steps}, multi_step={runner.multi_step}, "
                              f"tokens_per_row={runner.tokens_per_row}",
                          expected="steps_per_message=1, or a runner with multi_step=True and tokens_per_row=1")
    runner.input_type.require_advance()


def require_types(runner: ModelRunnerBase[Any]) -> None:
    """Whether the control plane can carry what the runner declares.

    Raises:
        BackendError: input_type is no ModelInput, or output_type is no Declared class, or a field of the latter is not
            replicated, and so does not travel.
    """
    name = type(runner).__name__
    for attribute, base in (("input_type", ModelInput), ("output_type", Declared)):
        kind = getattr(runner, attribute, None)
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise BackendError(f"{name}.{attribute} cannot be carried between ranks", got=repr(kind),
                               expected=f"a subclass of {base.__module__}.{base.__qualname__}",
                               hint="declare its tensors as annotated fields, as README.md shows")
    stays = [field.name for field in runner.output_type.schema.fields if field.scope != "replicated"]
    if stays:
        raise BackendError(f"{name}.output_type has fields that do not travel", got=", ".join(stays),
                           expected="replicated fields alone")
