"""Written against hal.contracts 2.0, and never edited: a backend that replaces each part of the default runner.

When a test of this file fails, a contract has changed. Then hal.contracts.VERSION must say so, and a copy for the new
version goes beside this one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from hal import Array, Backend, Capabilities, Communicator, PagedModelInput
from hal.config import WorkerConfig
from hal.contracts.attention import AttentionSpec, refuse_unsupported
from hal.contracts.device import DeviceRuntime
from hal.contracts.inputs import IntermediateTensors
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import OutputT, Progress, no_progress
from hal.errors import ConfigError
from hal.models.layers import Linear
from hal.models.ops import Ops
from hal.paged.runner import PagedModelRunner
from hal.sampling.sampler import Sampler
from hal.schema import Packed, stays


class FrozenInput(PagedModelInput):
    """A field of its own: the number of tokens of each sequence that are in the cache."""

    cached_lens: Annotated[torch.Tensor | None, Array("int32", "num_seqs", pad=0, advance=stays)] = None


class FrozenOps(Ops):
    schemes = ("dense",)

    def pack_linear(self, layer: Linear) -> None:
        layer.packed = layer.weight.data.t().contiguous()

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        y = x @ layer.packed
        return y if layer.bias is None else y + layer.bias

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                     ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rms_norm(x + residual, weight, eps), x + residual

    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        return [x.to(dtype) for x in table[positions.long()].unsqueeze(1).chunk(2, -1)]

    def rotary(self, heads: torch.Tensor, begun: Any) -> torch.Tensor:
        cos, sin = begun
        a, b = heads.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up


class FrozenAttention:
    """A layer's cache is [2, num_blocks, num_kv_heads, block_size, head_dim]; each sequence is computed by itself."""

    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        refuse_unsupported(specs, "the frozen attention")
        self.specs = specs

    def cache_shape(self, spec: AttentionSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> Any:
        m, size = model_input, model_input.block_size
        starts, lens = m.query_start_loc.tolist(), m.seq_lens.tolist()

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            spec, cache, out = self.specs[layer], kv_caches[layer], torch.zeros_like(q)
            real, slots = starts[-1], m.slot_mapping.long()
            for into, new in zip(cache, (k, v), strict=True):
                into[slots[:real] // size, :, slots[:real] % size] = new[:real]
            for row, (start, end) in enumerate(itertools.pairwise(starts)):
                if start == end:
                    continue
                at = torch.arange(lens[row])
                blocks = m.block_tables[row].long()[at // size]
                keys, values = (x[blocks, :, at % size].transpose(0, 1).repeat_interleave(
                    spec.num_heads // spec.num_kv_heads, 0) for x in cache)
                behind = at[lens[row] - (end - start):, None] - at
                seen = (behind >= 0) & (behind < (spec.window or lens[row] + 1))
                out[start:end] = F.scaled_dot_product_attention(
                    q[start:end].transpose(0, 1), keys, values, seen, scale=spec.scale).transpose(0, 1)
            return out.flatten(1)

        return attend


class FrozenSampler(Sampler):
    def argmax(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.max(-1).indices

    def descending(self, scores: torch.Tensor) -> torch.Tensor:
        return -(-scores).sort(-1).values


class FrozenRunner(PagedModelRunner):
    input_type = FrozenInput

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator, attention=FrozenAttention, ops=FrozenOps(),
                         sampler=FrozenSampler())

    def prepare_model_input(self, request: ExecuteModelRequest) -> FrozenInput:
        made = super().prepare_model_input(request)
        assert isinstance(made, FrozenInput)
        made.cached_lens = made.seq_lens - made.query_start_loc.diff()
        return made

    def stage(self, packed: Packed[PagedModelInput]) -> PagedModelInput:
        return packed.to(self.device)

    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        super().warmup(kv_caches, progress)
        progress("frozen", 1, 1)

    def execute_model(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                      intermediate: IntermediateTensors | None = None) -> SamplerOutput | IntermediateTensors | None:
        return super().execute_model(model_input, kv_caches, intermediate)

    def fetch(self, output: OutputT) -> Callable[[], OutputT]:
        return super().fetch(output)


class FrozenBackend(Backend):
    name = "composed_2_0:backend"
    priority = -300
    capabilities = Capabilities(contracts="2.0", dtypes=("float32",), max_tp=2, max_pp=2, swap=True, fp8_kv=False,
                                spmd=False, asynchronous=False, host_memory=True, ray_resource="CPU", token_cost=0.1,
                                embeddings=False, checkpoints=True)
    runtime = DeviceRuntime()

    def unavailable(self) -> str | None:
        return None

    def device(self, local_rank: int) -> torch.device:
        if local_rank > 64:
            raise ConfigError("there is no such device", got=local_rank, expected="at most 64")
        return torch.device("cpu")

    def free_memory(self, device: torch.device) -> int:
        return 1 << 30

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> FrozenRunner:
        return FrozenRunner(config, device, communicator)

    def versions(self) -> Mapping[str, str]:
        return {"frozen": "2.0"}


backend = FrozenBackend()
