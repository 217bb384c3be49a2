"""The numpy example with a fault in one layer: as it is, composed of operations, and in a runner that is not composed
of any and tells values. The folder examples/numpy-backend is on the path."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from hal_numpy import NumpyBackend
from hal_numpy.attention import NumpyAttention
from hal_numpy.ops import NumpyOps, NumpySampler

from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.runner import ModelRunnerBase
from hal.models.layers import Linear
from hal.paged.runner import PagedModelRunner


class FaultyOps(NumpyOps):
    """FAULT="layers.1.mlp.down_proj" makes the outputs of this layer one per cent too large."""

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        y = super().linear(x, layer)
        return y * 1.01 if layer.spec.projections[0].name == os.environ.get("FAULT") else y


class TellingRunner(ModelRunnerBase[PagedModelInput]):
    input_type, output_type = PagedModelInput, SamplerOutput
    prefix = ""  # before the names of the values

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inner = PagedModelRunner(*args, attention=NumpyAttention, ops=FaultyOps(), sampler=NumpySampler())

    def load_model(self, *args: Any) -> None:
        self.inner.load_model(*args)

    def kv_bytes_per_block(self) -> int:
        return self.inner.kv_bytes_per_block()

    def reserve_bytes(self) -> int:
        return self.inner.reserve_bytes()

    def make_kv_caches(self, num_blocks: int) -> Any:
        return self.inner.make_kv_caches(num_blocks)

    def warmup(self, *args: Any) -> None:
        self.inner.warmup(*args)

    def prepare_model_input(self, request: Any) -> PagedModelInput:
        return self.inner.prepare_model_input(request)

    def execute_model(self, *args: Any) -> Any:
        return self.inner.execute_model(*args)

    def execute_traced(self, model_input: PagedModelInput, kv_caches: Any, trace: Any) -> Any:
        hooks = []
        for name, module in self.inner.model.named_modules():
            if isinstance(module, Linear):
                _, _, rest = name.partition("layers.")
                number, _, short = rest.partition(".")
                layer = int(number) if number else None
                hooks.append(module.register_forward_hook(self._telling(trace, self.prefix + (short or name), layer)))
        try:
            return self.inner.execute_model(model_input, kv_caches)
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _telling(trace: Any, name: str, layer: int | None) -> Callable[..., None]:
        return lambda module, args, result: trace(name, layer, result.numpy())


class OtherNamesRunner(TellingRunner):
    prefix = "my_"


class ComposedBackend(NumpyBackend):
    name = "composed"

    def make_runner(self, *args: Any) -> Any:
        return PagedModelRunner(*args, attention=NumpyAttention, ops=FaultyOps(), sampler=NumpySampler())


class TellingBackend(NumpyBackend):
    name = "telling"

    def __init__(self, kind: type[TellingRunner]) -> None:
        self.kind = kind

    def make_runner(self, *args: Any) -> Any:
        return self.kind(*args)


composed, telling, other_names = ComposedBackend(), TellingBackend(TellingRunner), TellingBackend(OtherNamesRunner)
