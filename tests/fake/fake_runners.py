"""Runners that are right on the CPU. Most have one bug that only an accelerator shows: the fake device shows it too."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hal.contracts.attention import ForwardContext
from hal.contracts.backend import Backend, Capabilities
from hal.contracts.inputs import NULL_BLOCK, PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest
from hal.errors import CapacityError
from hal.paged.runner import PagedModelRunner
from hal.paged.shape_plan import Bucket
from hal.schema.packed import Packed, on_host
from hal.testing.fake import FakeBackend, FakeRunner
from hal.testing.fake_device import Event
from runners.tpu.attention import TpuAttention
from runners.tpu.inputs import TpuModelInput, bucket_for, fit
from runners.tpu.plan import make_plan


class OnCpu(Backend):
    """What a FakeBackend would make, on the CPU."""

    name = "on_cpu"
    capabilities = Capabilities(contracts="2.0", dtypes=("float32",), asynchronous=True)

    def __init__(self, runner: type[PagedModelRunner]) -> None:
        self.runner = runner

    def unavailable(self) -> str | None:
        return None

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def free_memory(self, device: torch.device) -> int:
        return 1 << 29

    def make_runner(self, *args: Any) -> Any:
        return self.runner(*args)


class adds_a_host_tensor(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        return super().head(hidden + torch.zeros(hidden.shape[-1]), m)


class indexes_by_host_memory(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        rows = torch.from_numpy(on_host(m, "logits_indices"))
        m.logits_indices = torch.arange(len(rows), dtype=torch.int32, device=hidden.device)
        return super().head(hidden[rows], m)


class writes_to_a_host_scalar(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        torch.tensor(0.0).add_(hidden.sum())
        return super().head(hidden, m)


class reads_it_as_numpy(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        assert not np.isnan(hidden.numpy()).any()
        return super().head(hidden, m)


class hands_a_pointer_to_c(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        assert hidden.data_ptr()
        return super().head(hidden, m)


class reduces_host_memory(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        self.communicator.all_reduce(torch.ones(1))
        return super().head(hidden, m)


class waits_in_a_step(FakeRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        assert bool(hidden.isfinite().all())
        return super().head(hidden, m)


class selects_by_mask(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        at = torch.arange(len(hidden), device=hidden.device)
        wanted = (at[:, None] == m.logits_indices).any(1)
        m.logits_indices = torch.arange(len(m.logits_indices), dtype=torch.int32, device=hidden.device)
        return super().head(hidden[wanted], m)


class allocates_what_it_does_not_count(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        torch.empty(1 << 26, dtype=torch.uint8, device=hidden.device)
        return super().head(hidden, m)


class reuses_a_buffer_in_flight(PagedModelRunner):
    """One buffer for the inputs of all steps, from which the device may still be copying."""

    buffer = np.zeros(1 << 20, np.uint8)

    def prepare_model_input(self, request: ExecuteModelRequest) -> PagedModelInput:
        self.state.apply(request)
        return self.copy_from(self.state.prepare(request), self.buffer)

    def copy_from(self, packed: Packed[PagedModelInput], buffer: np.ndarray) -> PagedModelInput:
        base = packed.buffer.__array_interface__["data"][0]
        buffer[:packed.buffer.size] = packed.buffer
        staged = torch.from_numpy(buffer[:packed.buffer.size]).to(self.device, non_blocking=True)
        arrays = {}
        for name, array in packed.arrays.items():
            at, dtype = array.__array_interface__["data"][0] - base, torch.from_numpy(array).dtype
            arrays[name] = staged[at:at + array.nbytes].view(dtype).view(array.shape)
        return packed.bind(arrays)


class waits_for_its_buffer(reuses_a_buffer_in_flight):
    """The same, right: two buffers in turn, each after the copy from it has run."""

    fetch = FakeRunner.fetch

    def prepare_model_input(self, request: ExecuteModelRequest) -> PagedModelInput:
        self.state.apply(request)
        if not hasattr(self, "ring"):
            self.ring = deque((np.zeros(1 << 16, np.uint8), Event(self.device)) for _ in range(2))
        buffer, copied = self.ring[0]
        self.ring.rotate()
        copied.synchronize()
        result = self.copy_from(self.state.prepare(request), buffer)
        copied.record()
        return result


class tells_tokens_too_early(PagedModelRunner):
    def fetch(self, output: SamplerOutput) -> Callable[[], SamplerOutput]:
        tokens = output.token_ids.to("cpu", non_blocking=True)
        return lambda: SamplerOutput(token_ids=tokens)


class waits_for_a_mark_set_too_early(PagedModelRunner):
    def fetch(self, output: SamplerOutput) -> Callable[[], SamplerOutput]:
        event = Event(self.device)
        event.record()
        tokens = output.token_ids.to("cpu", non_blocking=True)

        def result() -> SamplerOutput:
            event.synchronize()
            return SamplerOutput(token_ids=tokens)

        return result


class FailsOnce(FakeRunner):
    steps, FAILS = 0, 7

    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Any:
        FailsOnce.steps += 1
        if FailsOnce.steps == self.FAILS:
            raise RuntimeError("it breaks once")
        return super().head(hidden, m)


class FailsToWarmUp(FakeRunner):
    def warmup(self, kv_caches: Sequence[torch.Tensor], *_: Any) -> None:
        logits = kv_caches[0].float()
        try:
            torch.empty(1 << 40, device=logits.device)
        except torch.OutOfMemoryError as error:
            raise CapacityError("it does not fit") from error


class StaticRunner(PagedModelRunner):
    """Right where shapes are static: the TPU's buckets and attention, on another device. Greedy."""

    input_type = TpuModelInput

    def load_model(self, *args: Any) -> None:
        super().load_model(*args)
        self.attention: Any = TpuAttention(self.model.attention_specs)
        self.plan = make_plan(self.config)

    def prepare_model_input(self, request: ExecuteModelRequest) -> PagedModelInput:
        self.state.apply(request)
        packed: Any = self.state.prepare(request)
        return fit(packed, self.plan, self.config.max_model_len).to(self.device)

    def warmup(self, kv_caches: Sequence[torch.Tensor], *_: Any) -> None:
        for bucket in self.plan.buckets():
            self.execute_model(self.empty(bucket), kv_caches)

    def empty(self, bucket: Bucket) -> PagedModelInput:
        dims = {"num_tokens": bucket.dims["num_seqs"], "num_logits": bucket.dims["num_seqs"], **bucket.dims}
        packed = self.input_type.schema.allocate(dims, block_size=self.config.engine.block_size,
                                                 num_decode_seqs=dims["num_seqs"] * (bucket.kind == "decode"))
        for array in packed.arrays.values():
            array[...] = NULL_BLOCK
        if bucket.kind == "decode":
            packed.arrays["query_start_loc"][...] = np.arange(dims["num_seqs"] + 1)
        else:
            packed.arrays["query_start_loc"][1:] = 2
        return packed.to(self.device)

    @torch.inference_mode()
    def execute_model(self, m: Any, kv_caches: Sequence[torch.Tensor], *_: Any) -> SamplerOutput:
        bucket = bucket_for(self.plan, m._packed[0])
        step = self.attention.begin(m, kv_caches, bucket.kind == "decode")
        hidden = self.model(m.input_ids, m.positions, ForwardContext(step, m), None)
        for cache, new in zip(kv_caches, step.caches, strict=True):
            cache.copy_(new)
        tokens = self.model.compute_logits(hidden.index_select(0, m.logits_indices)).argmax(-1).int()
        return SamplerOutput(token_ids=tokens.cpu()[:m.num_samples])


fails_once = FakeBackend(FailsOnce)
fails_to_warm_up = FakeBackend(FailsToWarmUp)


class Box:
    """An object of a device's own, of which nobody but its runner knows anything."""

    __slots__ = ("inside",)

    def __init__(self, inside: Any) -> None:
        self.inside = inside


class opaque(FakeRunner):
    """Right: its cache is one object for all layers, and its outputs are no Declared objects, nor tensors."""

    two_phase = True

    def make_kv_caches(self, num_blocks: int) -> Any:
        shapes = self.cache_shapes(num_blocks)
        return Box(torch.zeros((len(shapes), *shapes[0]), dtype=self.kv_dtype, device=self.device))

    @staticmethod
    def read_blocks(kv_caches: Any, blocks: torch.Tensor) -> list[torch.Tensor]:
        return [kv_caches.inside.flatten(0, 1)[:, blocks.to(kv_caches.inside.device)]]

    @staticmethod
    def write_blocks(kv_caches: Any, blocks: torch.Tensor, values: Sequence[torch.Tensor]) -> None:
        whole = kv_caches.inside.flatten(0, 1)
        whole[:, blocks.to(whole.device)] = values[0].to(whole.device)

    def forward(self, m: PagedModelInput, kv_caches: Any, intermediate: Any) -> Any:
        return super().forward(m, list(kv_caches.inside), intermediate)

    def sample(self, forwarded: Any, m: PagedModelInput) -> Any:
        output = super().sample(forwarded, m)
        return None if output is None else Box(output)

    def fetch(self, output: Any) -> Any:
        return super().fetch(output.inside)


class OpaqueBackend(FakeBackend):
    name = "fake_runners:opaque_backend"


class writes_the_wrong_block(opaque):
    @staticmethod
    def write_blocks(kv_caches: Any, blocks: torch.Tensor, values: Sequence[torch.Tensor]) -> None:
        opaque.write_blocks(kv_caches, blocks - 1, values)


opaque_backend = OpaqueBackend(opaque)
shifting_backend = OpaqueBackend(writes_the_wrong_block)


no_syncs = FakeBackend(forbid_syncs=True)
