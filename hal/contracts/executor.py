"""The interface by which an engine drives the workers. Its implementation is in workers/, and is found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from hal.config import EngineConfig
from hal.contracts.backend import Backend
from hal.contracts.inputs import ModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import Progress, no_progress
from hal.errors import HalError, WorkerError
from hal.model_config import ModelConfig
from hal.schema import Declared
from hal.values import imported

_FACTORY = "workers.executors.driver:make_executor"


class StepHandle(Protocol):
    """A step that was submitted; the next may be submitted before this one is done."""

    def sample(self, columns: Mapping[str, Any] | None = None) -> None:
        """Send the second message of a step that was submitted with sampling_follows, so that its sampling begins. From
        then on the step's request has these arrays, as in a step of one phase.

        Args:
            columns: arrays by the names of SamplingRequest's fields, as `hal.features.masks.mask_fields` makes them.

        Raises:
            InputError: the arrays are not what the features declare; the step still waits.
            StateError: the step does not wait for its sampling. WorkerError: as `result`.
        """

    def result(self) -> Any:
        """Wait for the step. Returns its output on the host, of the executor's `output_type`.

        Raises:
            WorkerError: a rank failed or died; the executor is shut down.
            StateError: the step was submitted with sampling_follows, and `sample` has not been called.
        """


class Executor(Protocol):
    """All ranks of one engine.

    Attributes:
        num_blocks: KV blocks of the smallest rank, the null block included; 0 if no rank has a KV cache.
        num_cpu_blocks: host blocks for swapping.
        kv_bytes_per_block: bytes of one KV block on the rank whose block is the largest; 0 if no rank has a KV cache.
        has_row_states: layers of the model keep a state per row. So sequences cannot share a prefix, and a swap of a
            sequence swaps its row's state too.
        tokens_per_row: the most new tokens that a step gives a sequence.
        multi_step: ranks take several decode steps for one request (ExecuteModelRequest.num_steps).
        round_times: of an engine that speculates, where its runners measure them: sequences, drafts of each, and the
            seconds of a round that verifies and proposes so many (hal.speculation.rounds). On all ranks the same.
        input_type, output_type: the classes of a step's input and of its output, as the model runner declares them.
    """

    num_blocks: int
    num_cpu_blocks: int
    kv_bytes_per_block: int
    has_row_states: bool
    tokens_per_row: int
    multi_step: bool
    round_times: Sequence[Sequence[float]]
    input_type: type[ModelInput]
    output_type: type[Declared]

    def check(self) -> None:
        """Raise the error that ended this executor, if it has ended: a WorkerError, or a StateError after shutdown and
        in a forked child of the process that made it."""

    def health(self) -> HalError | None:
        """The error that the next step would raise, or None. It is that of `check`, or the WorkerError of a rank that
        failed while no step ran. May be called from any thread, at any time."""

    def on_failure(self, listener: Callable[[WorkerError], None]) -> None:
        """Call `listener` once, with the error, when a rank has failed: in a step, or while no step runs. It is called
        at once if a rank has failed already. The thread that finds the failure calls it, so it must return soon and
        must not call the executor: let it set an event, for instance. With wire="none", where the launcher watches
        the ranks, a failure is found in a step alone. A shutdown is no failure."""

    def execute_model(self, request: ExecuteModelRequest, *, sampling_follows: bool = False) -> StepHandle:
        """Run one step on all ranks.

        Args:
            sampling_follows: the step has two phases. Its forward pass begins now, and its sampling begins when
                `StepHandle.sample` is called. In the meantime the caller computes what only sampling needs, such as
                token masks. If the runner cannot divide a step (ModelRunnerBase.two_phase), the whole step begins with
                `StepHandle.sample`.

        Raises:
            StateError: the step before still waits for `StepHandle.sample`; or as `check`. WorkerError.
        """

    def expert_loads(self) -> np.ndarray[Any, Any] | None:
        """See ModelRunnerBase.expert_loads. May be called from any thread."""

    def shutdown(self) -> None:
        """End all workers and release what they hold. Idempotent; in a forked child it does nothing."""


class MakeExecutor(Protocol):
    def __call__(self, engine: EngineConfig, model: ModelConfig, backend: Backend, progress: Progress) -> Executor: ...


def make_executor(engine: EngineConfig, model: ModelConfig, backend: Backend,
                  progress: Progress = no_progress) -> Executor:
    """Start all ranks, load the model, allocate KV caches and warm up: in this process when there is one rank, else
    rank 0 in this process and the others in processes of their own. The configuration is checked against the model and
    the backend before any process starts.

    Raises:
        ConfigError, ModelLoadError, CapacityError, BackendError, WorkerError.
    """
    return cast(MakeExecutor, imported(_FACTORY))(engine, model, backend, progress)
