"""The interface of a worker for the executor, and the step that all workers share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hal.config import WorkerConfig
from hal.contracts.backend import Backend, select
from hal.contracts.communicator import Communicator
from hal.contracts.control_plane import ControlPlane
from hal.contracts.inputs import IntermediateTensors, ModelInput, SamplingInput, WorkerInput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.contracts.runner import Progress, no_progress
from hal.errors import StateError
from hal.guard import Phase, phase
from hal.profiling import span
from hal.schema import Declared
from hal.schema.packed import Buffer
from hal.values import imported
from workers.worker.wire_policy import WIRES, NoWire, StepInputs, Wire


class WorkerBase(abc.ABC):
    """One rank. To replace the whole worker, name a direct subclass to workers.executors.driver.make_executor.

    The executor calls, in this order: init_device, connect, load_model, determine_num_blocks, initialize_cache, warmup.
    Then the driver calls execute_model in every step, and fetch, or receive_output if execute_model gave no output. The
    other ranks call serve. With wire="none" every rank has an executor of its own. At the end all call shutdown.

    Attributes:
        input_type, output_type: the classes of a step's input and output; known after load_model.
        tokens_per_row: the most new tokens that a step gives a sequence; known after load_model.
        multi_step: a step may be several decode steps (ModelRunnerBase.multi_step).
        round_times: see hal.contracts.executor.Executor; known after warmup.
        two_phase: the worker has `sample`, so execute_model takes a request whose sampling follows.
    """

    input_type: type[ModelInput]
    output_type: type[Declared]
    two_phase = multi_step = False
    tokens_per_row: int = 1
    round_times: Sequence[Sequence[float]] = ()

    def __init__(self, config: WorkerConfig, backend: Backend) -> None:
        self.config, self.backend, self.topology = config, backend, config.topology

    @abc.abstractmethod
    def init_device(self) -> torch.device:
        """Choose this rank's device and make it current. The other ranks cannot be reached yet."""

    @abc.abstractmethod
    def connect(self, plane: ControlPlane, communicator: Communicator) -> None:
        """Take the links to the other ranks; `shutdown` closes them."""

    @abc.abstractmethod
    def load_model(self, progress: Progress = no_progress) -> None:
        """Raises ModelLoadError, ConfigError, CapacityError."""

    @abc.abstractmethod
    def determine_num_blocks(self) -> int:
        """KV blocks that this rank's memory holds. Raises CapacityError."""

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of one KV block on this rank. Known once the model is loaded."""
        return 0

    @property
    def has_row_states(self) -> bool:
        """See hal.contracts.executor.Executor. Known once the model is loaded."""
        return False

    def expert_loads(self) -> np.ndarray[Any, Any] | None:
        """See hal.contracts.executor.Executor."""
        return None

    @abc.abstractmethod
    def initialize_cache(self, num_blocks: int) -> None:
        """Allocate; `num_blocks` is the smallest of all ranks."""

    @abc.abstractmethod
    def warmup(self, progress: Progress = no_progress) -> None:
        """Compile or capture everything that steps need. All ranks do so at the same time."""

    @abc.abstractmethod
    def execute_model(self, request: ExecuteModelRequest) -> Any:
        """Run a step of the scheduler. Returns the output if this rank samples, and None if the sampling follows."""

    def sample(self, sampling: SamplingRequest) -> Any:
        """The driver: complete the step that was executed last, whose sampling follows. Returns the output if this rank
        samples."""
        raise StateError(f"{type(self).__name__} has no step in two phases", expected="two_phase = False")

    def fetch(self, output: Any) -> Callable[[], Declared]:
        """Begin to copy an output of this rank to the host. The returned function waits for the copy, and gives the
        step's `output_type`."""
        return lambda: output

    def receive_output(self) -> Callable[[], Buffer]:
        """The driver, if another rank samples: a function that waits for the packed output of the step that was
        executed last."""
        raise StateError(f"{type(self).__name__} does not say how another rank's output arrives",
                         expected="receive_output, or an output from execute_model on the driver")

    @abc.abstractmethod
    def serve(self) -> None:
        """Run the steps that the driver announces, until it announces the end."""

    @abc.abstractmethod
    def shutdown(self) -> None:
        """Release what the rank holds. Idempotent."""

    def facts(self) -> dict[str, str]:
        """Facts, by name, that must be the same on all ranks after their models are loaded."""
        return {}

    def describe_step(self) -> str:
        """The step that runs or ran last, for an error message."""
        return ""


class LocalOrDistributedWorkerBase(WorkerBase):
    """The worker of vLLM's RFC #5552: `prepare`, the step's message and `execute` are written once for every topology.
    The wire policy decides which ranks prepare, and what the message holds. A subclass implements both verbs.

    Attributes:
        wire: the wire policy, which decides what the driver's message holds. plane: the control plane.
        communicator: the data plane.
        steps: the number of steps begun. model_input: the input of the last one. forwarded: the result of its forward
            pass, for its sampling.
    """

    plane: ControlPlane
    communicator: Communicator

    def __init__(self, config: WorkerConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        self.wire: Wire = WIRES[config.engine.wire] if self.topology.world_size > 1 else NoWire()
        self.steps = 0
        self.model_input: ModelInput | None = None
        self.forwarded: Any = None

    @abc.abstractmethod
    def prepare_worker_input(self, request: ExecuteModelRequest) -> WorkerInput:
        """The input of `execute_worker`: the block moves before the step. Phase prepare."""

    @abc.abstractmethod
    def prepare_model_input(self, request: ExecuteModelRequest) -> ModelInput:
        """The runner's input of the step, checked, on this rank's device. Phase prepare."""

    @abc.abstractmethod
    def unpack(self, parts: list[Buffer]) -> StepInputs:
        """A step that the driver prepared, checked, on this rank's device."""

    @abc.abstractmethod
    def prepare_sampling_input(self, sampling: SamplingRequest) -> SamplingInput:
        """What sampling needs of the step that was prepared last, checked, on this rank's device. Phase prepare."""

    @abc.abstractmethod
    def unpack_sampling(self, part: Buffer) -> SamplingInput:
        """The same that the driver prepared."""

    @abc.abstractmethod
    def join(self, model_input: ModelInput, sampling: SamplingInput) -> None:
        """Bring the input of a step that has begun into the state that sampling expects, checked."""

    @abc.abstractmethod
    def execute_worker(self, worker_input: WorkerInput) -> None:
        """Bring the KV cache into the state that the step expects."""

    @abc.abstractmethod
    def execute_runner(self, model_input: ModelInput, intermediate: IntermediateTensors | None,
                       sampling_follows: bool) -> Any:
        """Compute this rank's part of the step. Returns its output, IntermediateTensors or None. If sampling follows,
        the last stage computes the forward pass alone, and returns the argument of `execute_sampling`. Phase execute.
        """

    @abc.abstractmethod
    def execute_sampling(self, forwarded: Any, model_input: ModelInput) -> Any:
        """Compute the rest, on the last stage. Phase execute."""

    @abc.abstractmethod
    def receive_intermediate(self, model_input: ModelInput) -> IntermediateTensors:
        """Receive the tensors of the previous pipeline stage. Not called on the first stage."""

    def prepare(self, request: ExecuteModelRequest) -> StepInputs:
        self.steps, self.model_input = self.steps + 1, None
        with phase(Phase.PREPARE, self.topology.rank), span("prepare"):
            return self.prepare_worker_input(request), self.prepare_model_input(request)

    def prepare_sampling(self, sampling: SamplingRequest) -> SamplingInput:
        with phase(Phase.PREPARE, self.topology.rank), span("prepare"):
            return self.prepare_sampling_input(sampling)

    def execute_model(self, request: ExecuteModelRequest) -> Any:
        with phase(Phase.WORKER, self.topology.rank):
            return self.execute_step(*self.wire.share(self, request))

    def sample(self, sampling: SamplingRequest) -> Any:
        with phase(Phase.WORKER, self.topology.rank):
            return self.complete_step(self.wire.share_sampling(self, sampling))

    def serve(self) -> None:
        with phase(Phase.WORKER, self.topology.rank):
            while (step := self.wire.receive(self)) is not None:
                self.execute_step(*step)
                if step[0].sampling_follows:
                    sampling = self.wire.receive_sampling(self)
                    if sampling is None:  # the engine ends between the two phases
                        break
                    self.complete_step(sampling)

    def receive_output(self) -> Callable[[], Buffer]:
        fingerprint = self.communicator.fingerprint.copy()

        def result() -> Buffer:
            sealed = self.plane.receive_output().copy()
            self.communicator.check()
            return fingerprint.open(sealed, "the rank that samples")

        return result

    def execute_step(self, worker_input: WorkerInput, model_input: ModelInput) -> Any:
        """Execute a step. Every rank does this, whichever rank has prepared the step."""
        topology, self.model_input = self.topology, model_input
        if topology.world_size > 1:
            self.communicator.fingerprint.begin(self.steps, model_input.checksum())
        self.execute_worker(worker_input)
        intermediate = None if topology.is_first_stage else self.receive_intermediate(model_input)
        follows = worker_input.sampling_follows
        with phase(Phase.EXECUTE, topology.rank), span("execute"):
            output = self.execute_runner(model_input, intermediate, follows)
        if follows and topology.is_last_stage:
            self.forwarded = output
            return None
        return self._deliver(output)

    def complete_step(self, sampling: SamplingInput) -> Any:
        """What every rank does when the second message of a step has come. Stages before the last have no more to
        compute; they keep the state of their rows."""
        topology, model_input = self.topology, self.model_input
        assert model_input is not None
        if topology.world_size > 1:
            self.communicator.fingerprint.join(sampling.checksum())
        self.join(model_input, sampling)
        if not topology.is_last_stage:
            return None
        forwarded, self.forwarded = self.forwarded, None
        with phase(Phase.EXECUTE, topology.rank), span("execute"):
            output = self.execute_sampling(forwarded, model_input)
        return self._deliver(output)

    def _deliver(self, output: Any) -> Any:
        """The end of a step: send the result to the next stage or to the driver. A driver that samples returns it."""
        topology = self.topology
        self.communicator.end_step()
        if topology.samples and output is not None:  # the runner's `fetch` knows what it is
            if topology.is_driver:
                return output
            self.plane.send_output(self.communicator.fingerprint.seal(self.fetch(output)().to_buffer()))
            return None
        wanted: type = self.output_type if topology.samples else type(None)
        if not topology.is_last_stage:
            wanted = IntermediateTensors
        if not isinstance(output, wanted):
            raise StateError("execute_model returned something else than this rank's part of the step",
                             got=type(output).__name__, expected=wanted.__name__)
        if isinstance(output, IntermediateTensors):
            self.communicator.send(output)
        return None


def make_worker(name: str, config: WorkerConfig, backend: Backend | None = None) -> WorkerBase:
    """The worker of a rank; without a backend, that of config.engine.device."""
    kind: type[WorkerBase] = imported(name)
    return kind(config, backend or select(config.engine.device))
