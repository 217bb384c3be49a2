"""ModelRunnerBase, the interface that a device implements. A runner prepares steps and executes them on one rank."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np

from hal.config import WorkerConfig
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import IntermediateTensors, ModelInput, SamplingInput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.errors import StateError
from hal.schema import Declared

if TYPE_CHECKING:
    import numpy as np
    import torch

InputT = TypeVar("InputT", bound=ModelInput)
OutputT = TypeVar("OutputT", bound=Declared)
Progress = Callable[[str, int, int], None]  # what, done, total
Trace = Callable[[str, "int | None", "np.ndarray[Any, Any]"], None]  # name, layer, value


def no_progress(what: str, done: int, total: int) -> None:
    pass


class ModelRunnerBase(abc.ABC, Generic[InputT]):
    """`Backend.make_runner` makes a runner. The worker calls, in this order: load_model, kv_bytes_per_block and
    reserve_bytes, make_kv_caches, warmup; then prepare_model_input and execute_model in every step.

    Attributes:
        tokens_per_row: the most new tokens that a step gives a sequence. Above 1, the engine schedules synchronously,
            since only this step's output says how many tokens the next step begins with.
        verifies: the runner takes steps with drafts (PagedModelInput.sample_counts), and accepts those that equal the
            sampled tokens (hal.sampling.verification). Without it, speculative decoding is refused.
        input_type: the declared input of a step. output_type: its declared output, on the rank that samples.
        two_phase: the runner has execute_forward, prepare_sampling_input and execute_sampling, so the input of sampling
            may arrive while the device runs the forward pass. If False, a step in two phases is executed when both
            messages have arrived. A subclass that overrides execute_model must set this again.
        multi_step: a class attribute, whether execute_model takes the `num_steps` decode steps of an input, one after
            another on the device, and gives the tokens of them all: hal.paged.steps.take_steps does so. Each array of
            the input then declares how it advances (ModelInput.advance). A subclass that overrides execute_model must
            set this again.
        has_row_states: a layer of the model, of any pipeline stage, keeps a state per row; set by load_model. Then the
            step's input names each sequence's row.
        row_states: the tensors of these states on this rank; dimension 1 counts rows.
        intermediate_type: the class of the tensors between pipeline stages; set by load_model when pp > 1.
        rounds: the sizes (sequences, drafts of each) of rounds of speculative decoding whose time is worth measuring
            after the warm-up, since the runner has prepared programs for them; such a runner has `dummy_round`. The
            sizes of every number of sequences begin with 0 drafts.
        compiled: the number of programs compiled or graphs captured so far. `warmup` makes the last of them, unless the
            user limits its time. late: how many of them steps have made later. uncompiled: how many no step has needed
            yet.
    """

    input_type: ClassVar[type[ModelInput]]
    output_type: ClassVar[type[Declared]]
    two_phase: ClassVar[bool] = False
    multi_step: ClassVar[bool] = False
    tokens_per_row: int = 1
    verifies: ClassVar[bool] = False
    intermediate_type: type[IntermediateTensors] | None = None
    has_row_states: bool = False
    row_states: Sequence[torch.Tensor] = ()
    rounds: Sequence[tuple[int, int]] = ()
    compiled: int = 0
    late: int = 0
    uncompiled: int = 0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("two_phase", "multi_step"):
            if "execute_model" in cls.__dict__ and name not in cls.__dict__:
                setattr(cls, name, False)  # what is inherited does not belong to this execute_model

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        self.config, self.device, self.communicator = config, device, communicator

    @abc.abstractmethod
    def load_model(self, progress: Progress = no_progress) -> None:
        """Build this rank's part of the model and load its weights. Raises ModelLoadError, ConfigError."""

    def expert_loads(self) -> np.ndarray[Any, Any] | None:
        """Of an engine with EngineConfig.expert_loads: int64 [layers with experts, experts], the tokens that each
        expert was chosen for since the model was loaded. It waits for the device. None where the runner counts none."""
        return None

    @abc.abstractmethod
    def kv_bytes_per_block(self) -> int:
        """Bytes of one KV block over this rank's layers; 0 if they keep no blocks. If no rank keeps blocks, as with an
        encoder, the executor has no blocks, and requests come without block tables."""

    @abc.abstractmethod
    def reserve_bytes(self) -> int:
        """Bytes that the largest step may need beside weights and KV cache."""

    @abc.abstractmethod
    def make_kv_caches(self, num_blocks: int) -> Any:
        """Zeroed caches of `num_blocks` blocks; block 0 is the null block. Type and layout are the runner's own: a
        tensor for each layer, or one object of any kind for all layers. Every step gets this object. Nothing but
        `read_blocks` and `write_blocks` looks into it. The default of these two reads and writes a sequence of tensors,
        one for each layer with a paged cache, dimension 1 counting blocks.
        """

    @staticmethod
    def read_blocks(kv_caches: Any, blocks: torch.Tensor) -> list[torch.Tensor]:
        """A copy of these blocks ([n] int64, on the host) in tensors whose dimension 1 counts them, in any memory that
        the runner chooses. Together they have kv_bytes_per_block bytes a block. The worker calls it between steps, to
        copy blocks and to swap them to the host."""
        return [cache[:, blocks.to(cache.device)] for cache in kv_caches]

    @staticmethod
    def write_blocks(kv_caches: Any, blocks: torch.Tensor, values: Sequence[torch.Tensor]) -> None:
        """Write `values` into these blocks. `read_blocks` gave them; they may have been moved to the host since."""
        for cache, value in zip(kv_caches, values, strict=True):
            cache[:, blocks.to(cache.device)] = value.to(cache.device)

    @abc.abstractmethod
    def warmup(self, kv_caches: Any, progress: Progress = no_progress) -> None:
        """Compile or capture every shape that a step may have. Nothing compiles or captures afterwards, unless the user
        limited the time of the warm-up. Programs that steps compile later count in `late`."""

    def load_adapter(self, slot: int, path: str) -> None:
        """Put the adapter of a directory (hal.adapters.files) into a slot, 0 to EngineConfig.max_adapters - 1,
        whatever the slot held before. It is called between steps; earlier steps may still run on the device, and later
        ones use it. The engine has checked the adapter.

        Raises:
            ModelLoadError: the directory cannot be read on this rank.
        """
        raise StateError(f"{type(self).__name__} has no slots for adapters", expected="load_adapter, since its "
                         "backend declares Capabilities(adapters=True)")

    @abc.abstractmethod
    def prepare_model_input(self, request: ExecuteModelRequest) -> InputT:
        """Apply the request's diffs and build this step's input on the device. Phase prepare: no communication.

        Raises:
            StateError: the request does not follow the one before it.
        """

    @abc.abstractmethod
    def execute_model(self, model_input: InputT, kv_caches: Any,
                      intermediate: IntermediateTensors | None = None) -> Any:
        """Phase execute: data plane only, through the communicator.

        Returns:
            On the rank that samples an output that `fetch` opens: an `output_type`, or an object of the runner's own.
            None on its tensor-parallel peers, IntermediateTensors on every rank of an earlier stage.
        """

    def execute_traced(self, model_input: InputT, kv_caches: Any, trace: Trace) -> Any:
        """`execute_model` on a single rank that also tells intermediate values, so that `hal bisect` can name the layer
        at fault. A runner need not have it, and may compile in it.

        Args:
            trace: called with a name, the layer's number (None outside the layers) and a value on the host, in the
                order of the computation. A value is named after the linear layer of hal.models whose result
                [num_tokens or more, outputs] it is: "attention.qkv", "attention.out", "mlp.gate_up", "mlp.down".
                "attention" is the argument of "attention.out". Outside the layers "head" is the logits of the sampled
                tokens. Any of them may be left out.
        """
        raise StateError(f"{type(self).__name__} does not tell intermediate values", expected="execute_traced")

    def execute_forward(self, model_input: InputT, kv_caches: Any,
                        intermediate: IntermediateTensors | None = None) -> Any:
        """The part of `execute_model` that does not need the SamplingInput. Phase execute.

        Returns:
            IntermediateTensors on every rank of an earlier stage; on the last stage the argument of `execute_sampling`.
        """
        raise self._undivided("execute_forward")

    def prepare_sampling_input(self, sampling: SamplingRequest) -> SamplingInput:
        """The second part of the step that `prepare_model_input` prepared last, on the device. Phase prepare.

        Raises:
            StateError: it is of another step.
        """
        raise self._undivided("prepare_sampling_input")

    def execute_sampling(self, forwarded: Any, model_input: InputT) -> Any:
        """The rest of `execute_model` on every rank of the last stage. Phase execute.

        Args:
            forwarded: what `execute_forward` returned. model_input: the step's, joined with its SamplingInput.
        """
        raise self._undivided("execute_sampling")

    def _undivided(self, method: str) -> StateError:
        return StateError(f"{type(self).__name__} declares two_phase, and does not implement {method}")

    def fetch(self, output: Any) -> Callable[[], Any]:
        """Begin to copy to the host an output that execute_model or execute_sampling returned. The returned function
        waits for the copy, and gives an `output_type` whose tensors are on the host. Nothing else opens an output. On a
        device that runs steps while the host goes on, it must not wait for steps that were submitted later.

        Raises:
            StateError: the output is no `output_type`, and the runner has no `fetch` of its own.
        """
        if not isinstance(output, self.output_type):
            raise StateError("execute_model returned something else than this rank's part of the step",
                             got=type(output).__name__, expected=self.output_type.__name__,
                             hint="a runner whose outputs are of another type opens them in its `fetch`")
        values = output.__dict__
        if all((tensor := values[f.name]) is None or tensor.is_cpu for f in type(output).schema.replicated):
            return lambda: output
        return lambda: type(output).from_buffer(output.to_buffer())
