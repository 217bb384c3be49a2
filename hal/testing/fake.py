"""The fake backend: it shows on any machine bugs that otherwise only an accelerator shows (see docs/backends.md).

    backend = FakeBackend(MyRunner, static_shapes=True)      # hal generate --device mymodule:backend "37+85="
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hal.config import WorkerConfig
from hal.contracts.backend import Backend, Capabilities
from hal.contracts.communicator import AxisName, Communicator, NativeSums
from hal.contracts.device import DeviceRuntime
from hal.contracts.inputs import PagedModelInput, SamplingInput
from hal.contracts.request import SamplingRequest
from hal.contracts.runner import ModelRunnerBase, OutputT
from hal.paged.runner import PagedModelRunner
from hal.schema import Packed
from hal.testing.fake_device import Device, DeviceTensor, Event, Watch, refuse, taken


class FakeRunner(PagedModelRunner):
    """The default runner, copying as on a device that runs behind the host: no copy waits in a step."""

    def stage(self, packed: Packed[PagedModelInput]) -> PagedModelInput:
        return packed.to(self.device, non_blocking=True)  # nobody writes this buffer again

    def on_device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def prepare_sampling_input(self, sampling: SamplingRequest) -> SamplingInput:
        return self.state.prepare_sampling(sampling).to(self.device, non_blocking=True)

    def fetch(self, output: OutputT) -> Callable[[], OutputT]:
        schema = type(output).schema
        copies = {f.name: output[f.name] for f in schema.fields if output[f.name] is not None}
        copies |= {f.name: copies[f.name].to("cpu", non_blocking=True) for f in schema.replicated if f.name in copies}
        event = Event(self.device)
        event.record()

        def result() -> OutputT:
            event.synchronize()
            return type(output)(**copies)

        return result


class DeviceCommunicator:
    """The worker's communicator, as if the device had collectives. They run on the host's memory."""

    native_sums: NativeSums | None = None  # they take the host's memory alone

    def __init__(self, communicator: Communicator) -> None:
        self._inner = communicator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        return self._over("all_reduce", x, axis)

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        return self._over("all_gather", x, axis, dim)

    def reduce_scatter(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        return self._over("reduce_scatter", x, axis, dim)

    def all_to_all(self, x: torch.Tensor, axis: AxisName = "tp", send_sizes: Sequence[int] | None = None,
                   recv_sizes: Sequence[int] | None = None) -> torch.Tensor:
        return self._over("all_to_all", x, axis, send_sizes, recv_sizes)

    def broadcast(self, x: torch.Tensor, axis: AxisName = "tp", source: int = 0) -> torch.Tensor:
        return self._over("broadcast", x, axis, source)

    def _over(self, name: str, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if not isinstance(x, DeviceTensor):
            refuse("a collective of the device was given host memory", f"Communicator.{name}",
                   got=f"{list(x.shape)} on {x.device}")
        result = getattr(self._inner, name)(x.elem, *arguments)
        return x if result is x.elem else DeviceTensor(result, x.fake)


class FakeRuntime(DeviceRuntime):
    """Collectives reach the fake device's memory through the host, so nothing but waiting is asked of it."""

    def __init__(self, fake: Device) -> None:
        self.fake = fake

    def synchronize(self, device: torch.device) -> None:
        self.fake.synchronize()


class FakeBackend(Backend):
    """A backend whose device is the CPU, with the rules of an accelerator.

    Args:
        runner: the class to test. parts: its arguments beside those of `make_runner`.
        memory_bytes: memory of the device. An allocation beyond it raises OutOfDeviceMemory, a CapacityError.
        static_shapes: after the warm-up, an operation of execute_model with a new shape counts in `compiled`, and
            raises DeviceError under HAL_STRICT=1. A result whose size depends on data always raises DeviceError.
        forbid_syncs: after the warm-up, prepare_model_input and execute_model raise DeviceError if they wait.

    Attributes:
        fake: the device, which counts: syncs, used and peak bytes.
    """

    name = "fake"
    priority = -200  # never what "auto" means
    capabilities = Capabilities(contracts="2.0", dtypes=("float32", "bfloat16"), max_tp=4, max_pp=4, asynchronous=True,
                                adapters=True)

    def __init__(self, runner: type[ModelRunnerBase[Any]] = FakeRunner, *, memory_bytes: int = 1 << 29,
                 static_shapes: bool = False, forbid_syncs: bool = False, **parts: Any) -> None:
        self.runner, self.parts, self.fake = runner, parts, Device(memory_bytes)
        self.static_shapes, self.forbid_syncs = static_shapes, forbid_syncs
        self.runtime = FakeRuntime(self.fake)

    def unavailable(self) -> str | None:
        other = taken()
        return other and f"PyTorch has the device {other!r} in its place (PrivateUse1): uninstall what registers that"

    def device(self, local_rank: int) -> torch.device:
        return self.fake.torch_device  # each rank's process has one

    def free_memory(self, device: torch.device) -> int:
        return self.fake.memory_bytes - self.fake.used

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator,
                    ) -> ModelRunnerBase[Any]:
        kind = _watched(self.runner, self.fake, Watch(self.static_shapes, self.forbid_syncs))
        made: ModelRunnerBase[Any] = kind(config, device, DeviceCommunicator(communicator), **self.parts)
        return made


def _watched(kind: type[ModelRunnerBase[Any]], fake: Device, watch: Watch) -> type[ModelRunnerBase[Any]]:
    """The runner, whose device knows when it prepares and when it executes."""
    class Watched(kind):  # type: ignore[misc, valid-type]
        compiled: int
        two_phase, multi_step = kind.two_phase, kind.multi_step

        def warmup(self, *args: Any) -> None:
            self._call(super().warmup, True, args)
            watch.warm = True

        def prepare_model_input(self, *args: Any) -> Any:
            return self._call(super().prepare_model_input, False, args)

        def execute_model(self, *args: Any) -> Any:
            return self._call(super().execute_model, True, args)

        def execute_forward(self, *args: Any) -> Any:
            return self._call(super().execute_forward, True, args)

        def prepare_sampling_input(self, *args: Any) -> Any:
            return self._call(super().prepare_sampling_input, False, args)

        def execute_sampling(self, *args: Any) -> Any:
            return self._call(super().execute_sampling, True, args)

        def _call(self, call: Callable[..., Any], in_step: bool, args: tuple[Any, ...]) -> Any:
            try:
                with fake.watched(watch, in_step):
                    return call(*args)
            finally:
                self.compiled, watch.compiled = self.compiled + watch.compiled, 0

    Watched.__name__ = Watched.__qualname__ = kind.__name__
    return Watched


backend = FakeBackend()
