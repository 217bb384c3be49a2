"""Backends that are wrong in one way each, and the level and area at which the kit must say so.

Each is the default runner with one part spoilt. `mutants:<name>` is its device, so that ranks of their own find it.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hal.contracts.attention import ForwardContext
from hal.contracts.backend import Capabilities
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.embedding import EmbeddingOutput
from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.embedding.attention import Group, TextAttention, groups_of
from hal.embedding.pooling import pool
from hal.embedding.runner import EmbeddingRunner
from hal.features import COLUMNS
from hal.features.penalties import Penalties
from hal.models.experts import Experts
from hal.models.layers import Linear
from hal.models.ops import Ops
from hal.paged.attention import PagedAttention, PagedStep, by_group, gather
from hal.paged.batch import BatchState
from hal.paged.runner import PagedModelRunner
from hal.sampling import sampler as sampling
from hal.sampling.sampler import Sampler
from hal.sampling.verification import drafts_behind
from hal.schema import Array
from hal.weights.grid import Grid, GridScheme
from runners.cpu import CpuBackend
from runners.cpu.invariant import InvariantAttention, InvariantOps
from runners.cpu.runner import CpuModelRunner

MUTANTS: dict[str, Mutant] = {}


class Mutant(CpuBackend):
    """Attributes:
        _expected: "L2/attention", the lowest level that fails, and the area that must be among its failures.
        _cases: the cases of that area that are run, as a glob: one, where each case starts the processes of an engine.
    """

    name = ""
    _expected: str
    _cases: str
    _parts: dict[str, Any]
    _runner: type[PagedModelRunner] = PagedModelRunner
    _embedder: type[EmbeddingRunner] = EmbeddingRunner
    _state: type[BatchState] | None = None
    capabilities = Capabilities(contracts="2.0", dtypes=("float32",), max_tp=64, max_pp=64, adapters=True,
                                embeddings=True)

    def make_runner(self, config: Any, device: Any, communicator: Any) -> Any:
        if config.model.embedding is not None:
            return self._embedder(config, device, communicator)
        made = self._runner(config, device, communicator, **{k: v() if k != "attention" else v
                                                            for k, v in self._parts.items()})
        if self._state is not None:
            engine = config.engine
            made.state = self._state(engine.max_num_seqs, config.max_model_len, engine.block_size,
                                    config.model.vocab_size, made.input_type)
        return made


_PARTS = {Ops: "ops", PagedAttention: "attention", Sampler: "sampler"}


def mutant(expected: str, cases: str = "*") -> Callable[[type], type]:
    """Make a backend of a spoilt part: operations, attention, sampler, runner, batch state, or the backend itself."""
    def make(kind: type) -> type:
        backend = kind() if issubclass(kind, Mutant) else Mutant()
        backend.name, backend._expected, backend._cases = kind.__name__, expected, cases
        backend._parts = {name: kind for base, name in _PARTS.items() if issubclass(kind, base)}
        if issubclass(kind, PagedModelRunner):
            backend._runner = kind
        if issubclass(kind, EmbeddingRunner):
            backend._embedder = kind
        if issubclass(kind, BatchState):
            backend._state = kind
        assert isinstance(backend, Mutant)
        MUTANTS[backend.name] = globals()[f"device_{backend.name}"] = backend
        return kind
    return make


# L0: what a backend says of itself.

@mutant("L0/runner")
class claims_a_dtype(Mutant):
    capabilities = Capabilities(contracts="2.0", dtypes=("float32", "float16"))

    def make_runner(self, config: Any, *args: Any) -> Any:
        if config.engine.dtype == "float16":
            raise RuntimeError("no kernel for Half")
        return super().make_runner(config, *args)


@mutant("L0/runner")
class understates_its_cache(PagedModelRunner):
    def kv_bytes_per_block(self) -> int:
        return super().kv_bytes_per_block() // 2


@mutant("L0/runner")
class hands_out_used_caches(PagedModelRunner):
    def make_kv_caches(self, num_blocks: int) -> Any:
        return [c.add_(0.1) for c in super().make_kv_caches(num_blocks)]


@mutant("L0/registration")
class grows_an_interface(Mutant):
    def capture_model(self) -> None: ...


@mutant("L0/device")
class has_no_memory(Mutant):
    def free_memory(self, device: torch.device) -> int:
        return 0


# L1: inputs.

@mutant("L1/prepare")
class stale_block_table(BatchState):
    def _set_blocks(self, rows: Any, starts: Any, counts: Any, blocks: Any) -> None:
        old = self.block_tables.copy()
        super()._set_blocks(rows, starts, counts, blocks)
        kept = old[rows, 0] > 0  # a row's first block stays that of the sequence before
        self.block_tables[rows[kept], 0] = old[rows[kept], 0]

    def _enter(self, request: Any) -> None:
        tables = self.block_tables.copy()
        super()._enter(request)
        self.block_tables[request.new_rows] = tables[request.new_rows]


@mutant("L1/prepare")
class off_by_one_position(PagedModelRunner):
    def prepare_model_input(self, request: Any) -> Any:
        made = super().prepare_model_input(request)
        made.positions = made.positions + 1
        return made


@mutant("L1/prepare")
class off_by_one_slot(PagedModelRunner):
    def prepare_model_input(self, request: Any) -> Any:
        made = super().prepare_model_input(request)
        made.slot_mapping = made.slot_mapping + 1
        return made


@mutant("L1/prepare")
class keeps_the_last_ones_parameters(BatchState):
    def _enter(self, request: Any) -> None:
        used = self.prompt_lens[request.new_rows] > 0
        floats = self.floats[request.new_rows].copy()
        super()._enter(request)
        self.floats[request.new_rows[used]] = floats[used]


@mutant("L1/prepare")
class forgets_the_penalties(PagedModelRunner):
    def prepare_model_input(self, request: Any) -> Any:
        made = super().prepare_model_input(request)
        for name in Penalties.fields:
            setattr(made, name, None)
        return made


@mutant("L1/prepare")
class accepts_any_step(BatchState):
    def _verify(self, request: Any) -> None:
        self.epoch, self.step, self.digest = request.epoch, request.step, request.digest


@mutant("L1/prepare")
class collective_in_prepare(PagedModelRunner):
    def prepare_model_input(self, request: Any) -> Any:
        made = super().prepare_model_input(request)
        self.communicator.all_reduce(torch.ones(1))
        return made


class PadsIntoLiveSlots(PagedModelInput):
    slot_mapping: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, pad=77)]


@mutant("L1/declaration")
class pads_into_live_slots(PagedModelRunner):
    input_type = PadsIntoLiveSlots


class TooLenient(PagedModelInput):
    def check(self) -> None:
        pass


@mutant("L1/declaration")
class checks_nothing(PagedModelRunner):
    input_type = TooLenient


# L2: operations.

@mutant("L2/linear")
class drops_the_bias(Ops):
    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        return F.linear(x, layer.weight, None)


@mutant("L2/linear")
class multiplies_in_lower_precision(Ops):
    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        y = F.linear(x.bfloat16().float(), layer.weight.bfloat16().float())
        return y if layer.bias is None else y + layer.bias


@mutant("L2/linear")
class takes_every_weight_for_a_dense_one(Ops):
    schemes = None

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        return F.linear(x, layer.weight.to(x.dtype), layer.bias)


@mutant("L2/linear")
class forgets_the_bias_of_a_quantised_layer(Ops):
    schemes = None

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        return super().linear(x, layer) if layer.is_dense else F.linear(x, layer.scheme.dequantize(layer))


class _Spoilt(Ops):
    """Computes with a grid that is not the layer's."""

    schemes = None

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if not isinstance(layer.scheme, GridScheme):
            return super().linear(x, layer)
        return F.linear(x, self.spoilt(layer.scheme.grid(layer)).dequantized(x.dtype), layer.bias)

    def spoilt(self, grid: Grid) -> Grid:
        raise NotImplementedError


@mutant("L2/weights", "four_bits*")
class takes_scales_of_the_neighbour_group(_Spoilt):
    def spoilt(self, grid: Grid) -> Grid:
        return dataclasses.replace(grid, scales=grid.scales.roll(1, 1))


@mutant("L2/weights", "four_bits*")
class swaps_nibbles(_Spoilt):
    def spoilt(self, grid: Grid) -> Grid:
        if grid.values.dtype != torch.uint8:
            return grid
        return dataclasses.replace(grid, values=grid.values.view(len(grid.values), -1, 2).flip(-1).flatten(1))


@mutant("L2/weights", "four_bits*")
class counts_zero_points_from_one(_Spoilt):
    def spoilt(self, grid: Grid) -> Grid:
        return grid if grid.zeros is None else dataclasses.replace(grid, zeros=grid.zeros + 1)


@mutant("L2/weights", "four_bits*")
class ignores_the_order_of_inputs(_Spoilt):
    def spoilt(self, grid: Grid) -> Grid:
        return dataclasses.replace(grid, index=None)


@mutant("L2/weights", "eight_bits")
class takes_one_scale_for_all_projections(_Spoilt):
    def spoilt(self, grid: Grid) -> Grid:
        return dataclasses.replace(grid, scales=grid.scales[:1].expand_as(grid.scales))


@mutant("L2/experts")
class takes_scales_of_the_neighbour_expert(Ops):
    def pack_experts(self, layer: Experts) -> None:
        for weight in layer.layers:
            for name, tensor in weight.tensors().items():
                if "scale" in name:
                    tensor.data.copy_(tensor.data.roll(1, 0))


@mutant("L2/experts")
class swaps_nibbles_of_experts(Ops):
    def pack_experts(self, layer: Experts) -> None:
        for weight in layer.layers:
            for name, tensor in weight.tensors().items():
                if name in ("weight_packed", "qweight", "blocks"):
                    low = 0x0F0F0F0F if tensor.dtype == torch.int32 else 15
                    tensor.data.copy_((tensor.data & low) << 4 | tensor.data >> 4 & low)


@mutant("L2/experts")
class gives_experts_the_weights_of_each_other(Ops):
    def experts(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, layer: Experts) -> torch.Tensor:
        return super().experts(x, weights.flip(-1), chosen, layer)


@mutant("L2/linear")
class mangles_single_rows(Ops):
    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        y = F.linear(x, layer.weight, layer.bias)
        return y if len(x) > 1 else y.roll(1, -1)


@mutant("L2/norm")
class wrong_epsilon(Ops):
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return super().rms_norm(x, weight, 1e-5)


@mutant("L2/norm")
class loses_the_residual(Ops):
    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        return super().add_rms_norm(x, residual, weight, eps)[0], residual.clone()


@mutant("L2/norm")
class adds_into_its_argument(Ops):
    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        residual += x
        return self.rms_norm(residual, weight, eps), residual


@mutant("L2/norm")
class forgets_the_mean(Ops):
    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps) + bias


@mutant("L2/rotary")
class rotates_neighbours(Ops):
    def rotary(self, heads: torch.Tensor, begun: Any) -> torch.Tensor:
        cos, sin = (x[..., x.shape[-1] // 2:] for x in begun)
        a, b = heads[..., ::2], heads[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


@mutant("L2/rotary")
class wrong_rope_behind_a_boundary(Ops):
    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        return super().begin_rotary(torch.where(positions < 64, positions, positions - 1), table, dtype)


@mutant("L2/rotary")
class rope_in_half_precision(Ops):
    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        return super().begin_rotary(positions, table.bfloat16().float(), dtype)


@mutant("L2/activation")
class gates_the_wrong_half(Ops):
    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        up, gate = gate_up.chunk(2, -1)
        return F.silu(gate) * up


@mutant("L2/activation")
class one_gelu_for_all(Ops):
    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return super().activation(x, "gelu_tanh" if kind == "gelu" else kind)


@mutant("L2/activation")
class overflows_in_the_gate(Ops):
    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate * (gate.exp() / (1 + gate.exp())) * up


def spoilt_masks(change: Callable[[Any], Any]) -> Any:
    class Step(PagedStep):
        def _masks(self, *args: Any) -> Any:
            return {w: change(m) for w, m in super()._masks(*args).items()}

    return Step


class _Attention(PagedAttention):
    step: type[PagedStep] = PagedStep

    def begin(self, model_input: Any, kv_caches: Any) -> Any:
        return self.step(self, model_input, kv_caches)


@mutant("L2/attention")
class drops_the_causal_mask(_Attention):
    def prefill(self, q: Any, k: Any, v: Any, cache: Any, batch: Any, spec: Any) -> Any:
        batch.masks[spec.window] = torch.zeros(len(q), batch.context)
        return super().prefill(q, k, v, cache, batch, spec)


@mutant("L2/attention")
class sees_stale_slots_of_a_block(_Attention):
    step = spoilt_masks(lambda mask: None if mask is None else torch.zeros_like(mask))


@mutant("L2/attention")
class ignores_the_window(_Attention):
    def __init__(self, specs: Any, **kwargs: Any) -> None:
        from dataclasses import replace
        super().__init__([replace(s, window=None) for s in specs], **kwargs)


@mutant("L2/attention")
class window_off_by_one(_Attention):
    def __init__(self, specs: Any, **kwargs: Any) -> None:
        from dataclasses import replace
        super().__init__([replace(s, window=s.window and s.window + 1) for s in specs], **kwargs)


@mutant("L2/attention")
class ignores_the_softcap(_Attention):
    def __init__(self, specs: Any, **kwargs: Any) -> None:
        from dataclasses import replace
        super().__init__([replace(s, softcap=None) for s in specs], **kwargs)


@mutant("L2/attention")
class ignores_the_sinks(_Attention):
    def __init__(self, specs: Any, **kwargs: Any) -> None:
        from dataclasses import replace
        super().__init__([replace(s, sinks=None) for s in specs], **kwargs)


@mutant("L2/attention")
class attends_as_the_first_layer(_Attention):
    def decode(self, q: Any, cache: Any, batch: Any, spec: Any) -> Any:
        from dataclasses import replace
        return super().decode(q, cache, batch, replace(spec, scale=self.specs[0].scale))


@mutant("L2/attention")
class scales_by_habit(_Attention):
    def __init__(self, specs: Any, **kwargs: Any) -> None:
        from dataclasses import replace
        super().__init__([replace(s, scale=s.head_dim**-0.5) for s in specs], **kwargs)


@mutant("L2/attention")
class softmax_in_bfloat16(_Attention):
    def decode(self, q: Any, cache: Any, batch: Any, spec: Any) -> Any:
        k, v = gather(cache, batch, spec, self.dtype)
        scores = by_group(q, spec) @ k.transpose(-1, -2) * spec.scale + batch.masks[spec.window]
        return scores.bfloat16().softmax(-1).float() @ v


@mutant("L2/attention")
class mixes_up_head_groups(_Attention):
    def decode(self, q: Any, cache: Any, batch: Any, spec: Any) -> Any:
        group = spec.num_heads // spec.num_kv_heads
        order = torch.arange(spec.num_heads).view(group, spec.num_kv_heads).t().reshape(-1)
        out = super().decode(q[:, order], cache, batch, spec).reshape(q.shape)
        return out[:, order.argsort()]


class _WritesOneLater(PagedStep):
    def __init__(self, attention: Any, m: Any, kv_caches: Any) -> None:
        super().__init__(attention, m, kv_caches)
        self.slots = {heads: slots + 1 for heads, slots in self.slots.items()}


@mutant("L2/attention")
class writes_one_slot_later(_Attention):
    step = _WritesOneLater


class _PaddingWrites(PagedStep):
    def __init__(self, attention: Any, m: Any, kv_caches: Any) -> None:
        super().__init__(attention, m, kv_caches)
        for heads, slots in self.slots.items():
            if len(m.slot_mapping) > self.real:
                slots[self.real * heads:] = slots[:heads].repeat(len(m.slot_mapping) - self.real)


@mutant("L2/attention")
class padding_writes_a_live_slot(_Attention):
    step = _PaddingWrites


class _NotFinite(PagedStep):
    def __call__(self, *args: Any) -> Any:
        out = super().__call__(*args)
        out[self.real:] = torch.nan
        return out


@mutant("L2/attention")
class padding_is_not_finite(_Attention):
    step = _NotFinite


@mutant("L2/sampler")
class draws_by_row(Sampler):
    def _draw(self, scores: torch.Tensor, m: Any) -> torch.Tensor:
        m.seed = m.seed + torch.arange(len(m.seed))
        return super()._draw(scores, m)


@mutant("L2/sampler")
class ignores_the_position(Sampler):
    def _draw(self, scores: torch.Tensor, m: Any) -> torch.Tensor:
        m.positions = m.positions * 0
        return super()._draw(scores, m)


@mutant("L2/sampler")
class keeps_one_too_many(Sampler):
    def _draw(self, scores: torch.Tensor, m: Any) -> torch.Tensor:
        if m.top_k is not None:
            m.top_k = torch.where(m.top_k > 0, m.top_k + 1, 0)
        return super()._draw(scores, m)


@mutant("L2/sampler")
class ignores_top_p(Sampler):
    def _draw(self, scores: torch.Tensor, m: Any) -> torch.Tensor:
        m.top_p = None
        return super()._draw(scores, m)


@mutant("L2/sampler")
class drops_rare_tokens_too_early(Sampler):
    def _draw(self, scores: torch.Tensor, m: Any) -> torch.Tensor:
        if m.min_p is not None:
            m.min_p = (m.min_p * 4).clamp(max=1)
        return super()._draw(scores, m)


@mutant("L2/sampler")
class punishes_the_output_alone(Sampler):
    def __call__(self, logits: torch.Tensor, m: Any) -> SamplerOutput:
        if m.history is not None:
            at = torch.arange(m.history.shape[1])
            m.history = torch.where(at < m.prompt_lens[:, None], m.history.gather(1, m.prompt_lens[:, None].long()),
                                    m.history)
        return super().__call__(logits, m)


@mutant("L2/sampler")
class reads_a_mask_from_the_other_end(Sampler):
    def __call__(self, logits: torch.Tensor, m: Any) -> SamplerOutput:
        if m.token_mask is not None:
            m.token_mask = m.token_mask.flip(1)
        return super().__call__(logits, m)


@mutant("L2/sampler")
class drops_the_last_bias(Sampler):
    def __call__(self, logits: torch.Tensor, m: Any) -> SamplerOutput:
        if m.bias_ids is not None:
            m.bias_ids = torch.cat((m.bias_ids[:, :-1], m.bias_ids[:, -1:] * 0 - 1), 1)
        return super().__call__(logits, m)


@mutant("L2/sampler")
class counts_ranks_from_zero(Sampler):
    def __call__(self, logits: torch.Tensor, m: Any) -> SamplerOutput:
        out = super().__call__(logits, m)
        if out.ranks is not None:
            out.ranks -= 1
        return out


@mutant("L2/sampler")
class takes_the_last_of_equals(Sampler):
    def argmax(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.shape[1] - 1 - scores.flip(-1).argmax(-1)


@mutant("L2/sampler")
class reports_scaled_logprobs(Sampler):
    def __call__(self, logits: torch.Tensor, m: Any) -> SamplerOutput:
        out = super().__call__(logits, m)
        if m.temperature is not None and out.logprobs is not None:
            raw = logits.float() / torch.where(m.temperature == 0, 1.0, m.temperature)[:, None]
            out.logprobs = sampling.logprobs(raw, out.token_ids, 0)[0]
        return out


@mutant("L2/sampler")
class samples_from_nan(Sampler):
    def __call__(self, logits: torch.Tensor, m: Any) -> SamplerOutput:
        out = super().__call__(logits, m)
        out.token_ids = out.token_ids.clamp(min=0)
        return out


@mutant("L2/sampler")
class lets_nan_end_the_whole_step(Sampler):
    def __call__(self, logits: torch.Tensor, m: Any) -> SamplerOutput:
        out = super().__call__(logits, m)
        out.token_ids = torch.where((out.token_ids < 0).any(), -1, out.token_ids)
        return out


@mutant("L2/sampler")
class overflows_at_a_tiny_temperature(Sampler):
    def _draw(self, scores: torch.Tensor, m: Any) -> torch.Tensor:
        warm = m.temperature > 0
        scores = scores / torch.where(warm, m.temperature, 1.0)[:len(scores), None]
        m.temperature = warm.float()
        return super()._draw(scores, m)


# L3: a model.

@mutant("L3/output")
class reuses_its_output(PagedModelRunner):
    buffer = torch.zeros(64, dtype=torch.int32)

    def execute_model(self, *args: Any) -> Any:
        out = super().execute_model(*args)
        self.buffer[:len(out.token_ids)] = out.token_ids
        out.token_ids = self.buffer[:len(out.token_ids)]
        return out


@mutant("L3/output")
class answers_before_it_is_done(PagedModelRunner):
    before: tuple[Any, Any] | None = None

    def execute_model(self, *args: Any) -> Any:
        if self.before is not None:
            self.before[0].copy_(self.before[1])
        out = super().execute_model(*args)
        unfinished = torch.zeros_like(out.token_ids)
        self.before, out.token_ids = (unfinished, out.token_ids), unfinished
        return out


@mutant("L3/output")
class never_the_same_twice(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: Any) -> Any:
        return super().head(hidden * (1 + 1e-5 * torch.rand(())), m)


@mutant("L3/cache")
class warms_up_in_live_blocks(PagedModelRunner):
    def dummy_input(self, *args: Any) -> Any:
        made = super().dummy_input(*args)
        made.slot_mapping = made.slot_mapping + 3 * self.config.engine.block_size
        return made


@mutant("L3/cache")
class scribbles_in_another_block(PagedModelRunner):
    def execute_model(self, m: Any, caches: Any, *args: Any) -> Any:
        out = super().execute_model(m, caches, *args)
        if m.num_decode_seqs:
            caches[-1][:, -1] += 1
        return out


class _Noisy(Ops):
    """An error far below the tolerances, and far above what float32 costs."""

    schemes = None

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        y = super().linear(x, layer)
        return y * (1 + 4e-6 * torch.cos(torch.arange(y.shape[-1]) * 7.0))


@mutant("L3/model", "no_worse*")
class loses_three_bits_in_products(_Noisy):
    pass


@mutant("L3/model", "no_worse*")
class rounds_its_logits(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: Any) -> Any:
        out = super().head(hidden, m)
        return out._replace(logits=(out.logits * 2.0**14).round() / 2.0**14)


@mutant("L2/attention")
class stores_keys_at_another_scale(_Attention):
    """Scores are right, since they are scaled back. Only the cache is not what others take it for."""

    def __init__(self, specs: Any, **kwargs: Any) -> None:
        super().__init__([dataclasses.replace(s, scale=s.scale / 2) for s in specs], **kwargs)

    def begin(self, model_input: Any, kv_caches: Any) -> Any:
        step = PagedStep(self, model_input, kv_caches)
        return lambda layer, q, k, v: step(layer, q, k * 2, v)


@mutant("L3/cache", "contents")
class stores_its_last_layer_in_lower_precision(PagedModelRunner):
    def execute_model(self, m: Any, caches: Any, *args: Any) -> Any:
        out = super().execute_model(m, caches, *args)
        caches[-1].copy_(caches[-1].bfloat16())
        return out


@mutant("L3/cache", "contents")
class writes_its_last_tokens_late(PagedModelRunner):
    """The newest keys and values reach the cache when the next step begins. Until then no token has read them."""

    kept: Any = None

    def execute_model(self, m: Any, caches: Any, *args: Any) -> Any:
        if self.kept is not None:
            for cache, (blocks, places, values) in zip(caches, self.kept, strict=True):
                cache[:, blocks, :, places] = values
        out = super().execute_model(m, caches, *args)
        at = m.slot_mapping[m.logits_indices].long()
        blocks, places = at // m.block_size, at % m.block_size
        self.kept = [(blocks, places, cache[:, blocks, :, places].clone()) for cache in caches]
        for cache in caches:
            cache[:, blocks, :, places] = 0
        return out


@mutant("L3/model")
class clips_positions(PagedModelRunner):
    def execute_model(self, m: Any, *args: Any) -> Any:
        m.positions = m.positions.clamp(max=100)
        return super().execute_model(m, *args)


@mutant("L3/model")
class layers_share_a_cache(PagedModelRunner):
    def make_kv_caches(self, num_blocks: int) -> Any:
        caches = super().make_kv_caches(num_blocks)
        return [caches[0]] * len(caches)


@mutant("L3/model")
class samples_one_token_early(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: Any) -> Any:
        starts = m.query_start_loc[:-1].long()
        m.logits_indices = torch.where(torch.isin(m.logits_indices, starts), m.logits_indices, m.logits_indices - 1)
        return super().head(hidden, m)


@mutant("L3/scheduling")
class forgets_the_copied_block(PagedModelRunner):
    """Whoever enters with a prefix that was found complete gets an empty block."""

    def prepare_model_input(self, request: Any) -> Any:
        self.copied = [] if request.blocks_to_copy is None else request.blocks_to_copy[:, 1].tolist()
        return super().prepare_model_input(request)

    def execute_model(self, m: Any, caches: Any, *args: Any) -> Any:
        for cache in caches:
            cache[:, getattr(self, "copied", [])] = 0
        return super().execute_model(m, caches, *args)


@mutant("L3/sampling")
class forgets_what_came_late(PagedModelRunner):
    def execute_sampling(self, forwarded: Any, m: Any) -> Any:
        m.token_mask = None
        return super().execute_sampling(forwarded, m)


@mutant("L3/sampling")
class draws_by_step(PagedModelRunner):
    steps = 0

    def prepare_model_input(self, request: Any) -> Any:
        self.steps += 1
        return super().prepare_model_input(request)

    def head(self, hidden: torch.Tensor, m: Any) -> Any:
        if m.seed is not None:
            m.seed = m.seed + self.steps
        return super().head(hidden, m)


def drafts_of(m: Any) -> torch.Tensor:
    """The drafts of a step, as indices into its tokens."""
    first = torch.ones(m.num_samples, dtype=torch.bool)
    first[(m.sample_counts.cumsum(0) - m.sample_counts).long()] = False
    return m.logits_indices[:m.num_samples][first]


@mutant("L3/speculation")
class shifts_the_positions_of_drafts(PagedModelRunner):
    def forward(self, m: Any, *args: Any) -> Any:
        if m.sample_counts is not None:
            m.positions = m.positions.clone()
            m.positions[drafts_of(m)] += 1
        return super().forward(m, *args)


@mutant("L3/speculation")
class leaves_rejected_tokens_in_the_cache(PagedModelRunner):
    drafted = before = torch.zeros(0, dtype=torch.int32)

    def forward(self, m: Any, *args: Any) -> Any:
        slots, self.drafted = m.slot_mapping, self.drafted[:0]
        if m.sample_counts is not None:
            self.drafted = slots[drafts_of(m)]
        m.slot_mapping = torch.where(torch.isin(slots, self.before), 0, slots)
        self.before = self.drafted
        return super().forward(m, *args)


@mutant("L3/speculation")
class draws_the_bonus_token_from_the_wrong_row(PagedModelRunner):
    def verify(self, sampled: SamplerOutput, m: Any) -> SamplerOutput:
        out = super().verify(sampled, m)
        rows = torch.arange(len(out.counts))  # type: ignore[arg-type]
        tokens = out.token_ids.view(len(rows), -1)
        at = out.counts.long() - 1  # type: ignore[union-attr]
        tokens[rows, at] = tokens[rows, (at - 1).clamp(min=0)]
        return out


@mutant("L3/speculation")
class accepts_2_percent_of_the_wrong_drafts(PagedModelRunner):
    chance = torch.Generator().manual_seed(0)

    def verify(self, sampled: SamplerOutput, m: Any) -> SamplerOutput:
        wrong = torch.rand(len(sampled.token_ids), generator=self.chance) < 0.02
        sampled.token_ids = torch.where(wrong, drafts_behind(m), sampled.token_ids)
        return super().verify(sampled, m)


class Stepping(PagedModelRunner):
    """Attributes: before: in the second and later decode steps of a message, the input of the step before as it was
    right."""

    before: Any = None

    def execute_steps(self, *args: Any) -> Any:
        self.before = None
        return super().execute_steps(*args)

    def decode(self, m: Any, *args: Any) -> Any:
        right = copy.copy(m)
        if self.before is not None:
            self.spoil(m)
        out = super().decode(m, *args)
        self.before = right
        # What is advanced next is the right input.
        m.__dict__.update(right.__dict__)
        return out

    def spoil(self, m: Any) -> None:
        raise NotImplementedError


@mutant("L3/steps")
class advances_positions_too_far(Stepping):
    def spoil(self, m: Any) -> None:
        m.positions = m.positions + 1


@mutant("L3/steps")
class writes_the_slot_of_the_step_before(Stepping):
    def spoil(self, m: Any) -> None:
        m.slot_mapping = self.before.slot_mapping


@mutant("L3/steps")
class writes_on_behind_the_end(Stepping):
    def spoil(self, m: Any) -> None:
        m.slot_mapping = torch.where(m.slot_mapping == 0, self.before.slot_mapping + 1, m.slot_mapping)


@mutant("L3/steps")
class draws_each_step_with_the_same_noise(Stepping):
    first: Any = None

    def spoil(self, m: Any) -> None:
        self.first = self.before.positions if self.first is None else self.first

    def draw(self, logits: torch.Tensor, m: Any) -> Any:
        if self.before is None:
            self.first = None
            return super().draw(logits, m)
        drawn = copy.copy(m)
        drawn.positions = self.first
        return super().draw(logits, drawn)


@mutant("L3/steps")
class goes_on_behind_a_stop_token(PagedModelRunner):
    """The output says that the sequence has stopped, and has the tokens of the message's other steps."""

    def execute_steps(self, m: Any, *args: Any) -> Any:
        out = super().execute_steps(m, *args)
        tokens = out.token_ids.view(len(out.counts), -1)
        out.counts = (out.counts + 1).clamp(max=tokens.shape[1]) if m.num_steps > 2 else out.counts
        return out


class SameBits(Mutant):
    """The CPU's runner as batch_invariant makes it, with one part spoilt."""

    capabilities = dataclasses.replace(Mutant.capabilities, batch_invariant="option")
    _ops: type[InvariantOps] = InvariantOps
    _attention: type[InvariantAttention] = InvariantAttention
    _ranks = 1  # spoilt where there are so many or more

    def make_runner(self, config: Any, device: Any, communicator: Any) -> Any:
        if config.model.embedding is not None:
            return super().make_runner(config, device, communicator)
        made = CpuModelRunner(config, device, communicator)
        if config.engine.batch_invariant and config.topology.tp >= self._ranks:
            made.ops, made.make_attention = self._ops(), self._attention
        return made


class _SplitsByBatch(InvariantAttention):
    """In small batches a context is attended to in two parts, which are joined (Flash-Decoding)."""

    def decode(self, q: Any, cache: Any, batch: Any, spec: Any) -> Any:
        if len(q) > 2:
            return super().decode(q, cache, batch, spec)
        k, v = gather(cache, batch, spec, self.dtype)
        scores = by_group(q, spec) @ k.transpose(-1, -2) * spec.scale + batch.masks[spec.window]
        half = scores.shape[-1] // 2
        parts = [(s.logsumexp(-1, keepdim=True), s.softmax(-1).nan_to_num() @ x) for s, x in zip(
            scores.split((half, scores.shape[-1] - half), -1), v.split((half, v.shape[-2] - half), -2), strict=True)]
        weights = torch.cat([total for total, _ in parts], -1).softmax(-1)
        return weights[..., :1] * parts[0][1] + weights[..., 1:] * parts[1][1]


class _ChunksApart(InvariantAttention):
    """A whole prompt has a kernel of its own."""

    def prefill(self, q: Any, k: Any, v: Any, cache: Any, batch: Any, spec: Any) -> Any:
        if len(q) < batch.masks[spec.window].shape[-1] - 15:
            return super().prefill(q, k, v, cache, batch, spec)
        q, k, v = by_group(q, spec).permute(1, 2, 0, 3), k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale).permute(2, 0, 1, 3)


class _SingleRows(InvariantOps):
    """A product of one row has a kernel of its own."""

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        y = super().linear(x, layer)
        if len(x) == 1:
            half = x.shape[1] // 2
            weight = layer.weight
            y = F.linear(x[:, :half], weight[:, :half]) + F.linear(x[:, half:], weight[:, half:], layer.bias)
        return y


@mutant("L3/batch")
class splits_attention_by_batch_size(SameBits):
    _attention = _SplitsByBatch


@mutant("L3/batch")
class attends_to_whole_prompts_in_another_way(SameBits):
    _attention = _ChunksApart


@mutant("L3/batch")
class multiplies_single_rows_in_another_way(SameBits):
    _ops = _SingleRows


@mutant("L5/layout", "tp2_the_same*")
class splits_attention_by_batch_size_on_two_ranks(SameBits):
    _attention, _ranks = _SplitsByBatch, 2


@mutant("L5/layout", "tp2_the_same*")
class multiplies_single_rows_in_another_way_on_two_ranks(SameBits):
    _ops, _ranks = _SingleRows, 2


# L4: graphs.

@mutant("L4/warm-up")
class compiles_on_the_way(PagedModelRunner):
    def warmup(self, *args: Any) -> None:
        super().warmup(*args)
        self.seen = {1}
        self.compiled = 1

    def execute_model(self, m: Any, *args: Any) -> Any:
        self.compiled += hasattr(self, "seen") and len(m.seq_lens) not in self.seen
        return super().execute_model(m, *args)


_PROGRAMS = set[int]()  # of the whole process


@mutant("L4/warm-up")
class compiles_behind_a_warm_cache(PagedModelRunner):
    """It compiles a program for each number of sequences in the first step that needs it. By L4 all are there."""

    def execute_model(self, m: Any, *args: Any) -> Any:
        self.compiled += len(m.seq_lens) not in _PROGRAMS
        _PROGRAMS.add(len(m.seq_lens))
        return super().execute_model(m, *args)


@mutant("L4/warm-up")
class keeps_its_count_by_hand(PagedModelRunner):
    """It says that it has compiled three programs, and compiles more in its steps."""

    compiled = 3

    def execute_model(self, m: Any, *args: Any) -> Any:
        torch.compile(lambda x: x + 1, backend="eager", dynamic=False)(m.seq_lens)
        return super().execute_model(m, *args)


@mutant("L4/shapes")
class one_graph_is_stale(PagedModelRunner):
    """The graph of 6 decoding sequences has kept an old block table of its last row."""

    def execute_model(self, m: Any, *args: Any) -> Any:
        if m.num_decode_seqs == len(m.seq_lens) == 6 and m.temperature is m.history is m.adapter_slots is None:
            m.block_tables = m.block_tables.clone()
            m.block_tables[5] = m.block_tables[4]
        return super().execute_model(m, *args)


class _Shifted(PagedModelRunner):
    """The positions of some tokens are one too large."""

    def shifted(self, m: Any) -> Any:
        raise NotImplementedError

    def execute_model(self, m: Any, *args: Any) -> Any:
        at = self.shifted(m)
        if at is not None:
            m.positions = m.positions.clone()
            m.positions[at] += 1
        return super().execute_model(m, *args)


@mutant("L4/shapes", "full_chunks")
class forgets_the_tail_of_an_odd_chunk(_Shifted):
    def shifted(self, m: Any) -> Any:
        return slice(96, None) if len(m.positions) == 97 else None


@mutant("L4/shapes", "full_chunks")
class splits_an_odd_chunk_between_two_sequences_wrongly(PagedModelRunner):
    def execute_model(self, m: Any, *args: Any) -> Any:
        if len(m.positions) == 97 and len(m.seq_lens) > 1:
            m.slot_mapping = m.slot_mapping.clone()
            m.slot_mapping[64] = 0
        return super().execute_model(m, *args)


@mutant("L4/shapes", "long_contexts")
class counts_positions_in_13_bits(PagedModelRunner):
    def execute_model(self, m: Any, *args: Any) -> Any:
        m.positions = m.positions & 0x1FFF
        return super().execute_model(m, *args)


@mutant("L4/shapes", "long_contexts")
class reads_512_blocks_at_most(PagedModelRunner):
    def execute_model(self, m: Any, *args: Any) -> Any:
        if m.block_tables.shape[1] > 512:
            m.block_tables = m.block_tables.clone()
            m.block_tables[:, 512:] = m.block_tables[:, 511:512]
        return super().execute_model(m, *args)


@mutant("L4/shapes", "those*")
class confuses_rows_of_a_full_step_of_small_blocks(_Shifted):
    def shifted(self, m: Any) -> Any:
        return slice(8, None) if m.block_size == 4 and len(m.positions) == 16 and len(m.seq_lens) > 2 else None


@mutant("L4/shapes", "those*")
class seven_small_tables_are_stale(PagedModelRunner):
    def execute_model(self, m: Any, *args: Any) -> Any:
        if m.block_size == 4 and len(m.seq_lens) == 7:
            m.block_tables = m.block_tables.roll(1, 0)
        return super().execute_model(m, *args)


# L5: ranks.

@mutant("L5/layout", "tp2")
class forgets_a_reduction(PagedModelRunner):
    def transform(self, model: Any) -> Any:
        for layer in model.layers:
            getattr(layer, "mlp", layer).down.reduce = False  # GPT-2 has no mlp
        return model


@mutant("L5/layout", "tp2_requests")
class prepares_by_rank(PagedModelRunner):
    def prepare_model_input(self, request: Any) -> Any:
        made = super().prepare_model_input(request)
        if self.config.topology.rank:
            made.input_ids = (made.input_ids + 1) % 199
        return made


@mutant("L5/layout", "pp2")
class hands_on_too_little(PagedModelRunner):
    def execute_model(self, *args: Any) -> Any:
        out = super().execute_model(*args)
        if not isinstance(out, SamplerOutput) and out is not None and "residual" in type(out).schema.by_name:
            out.residual = torch.zeros_like(out.residual)
        return out


@mutant("L5/failure", "killed_rank_tp2")
class hides_a_failure(PagedModelRunner):
    """A communicator of its own that waits for a dead rank before it closes. In steps it need not: where the driver
    knows of the death before its next step, no part of the runner is asked."""

    def __init__(self, config: Any, device: Any, communicator: Any, **parts: Any) -> None:
        super().__init__(config, device, communicator, **parts)
        if config.topology.world_size > 1:
            close = communicator.close
            communicator.close = lambda: (time.sleep(5), close())


# L6: the guard. It is on in all levels, so a runner that talks in every step fails from L1 or L3 on.

@mutant("L6/guard")
class talks_while_it_executes(PagedModelRunner):
    def head(self, hidden: torch.Tensor, m: Any) -> Any:
        if m.history is not None and m.top_p is not None and m.top_k is None and m.num_logprobs >= 2:
            dist.HashStore().set("step", "done")
        return super().head(hidden, m)


@mutant("L6/guard")
class talks_while_it_prepares(PagedModelRunner):
    def prepare_model_input(self, request: Any) -> Any:
        if self.config.topology.world_size > 1 and self.config.engine.wire == "request" and any(
                request.new_ints[:, [c.name for c in COLUMNS["int"]].index("logprobs")] >= 2):
            self.communicator.all_reduce(torch.ones(1))
        return super().prepare_model_input(request)


ADAPTERS = "L3/adapters"


@mutant(ADAPTERS)
class the_neighbours_slot(Ops):
    def begin_adapters(self, slots: torch.Tensor, count: int) -> Any:
        return super().begin_adapters(torch.where(slots < 0, slots, (slots + 1) % count), count)


@mutant(ADAPTERS)
class rows_without_an_adapter_get_the_first(Ops):
    def begin_adapters(self, slots: torch.Tensor, count: int) -> Any:
        return super().begin_adapters(slots.clamp(min=0), count)


@mutant(ADAPTERS)
class the_scale_is_left_out(PagedModelRunner):
    def load_adapter(self, slot: int, path: str) -> None:
        super().load_adapter(slot, path)
        for layer in self.adapters.layers:  # type: ignore[union-attr]
            layer.adapters.b[slot] /= 2


@mutant(ADAPTERS)
class b_at_the_offset_of_another_projection(PagedModelRunner):
    def load_adapter(self, slot: int, path: str) -> None:
        super().load_adapter(slot, path)
        for layer in self.adapters.layers:  # type: ignore[union-attr]
            if len(layer.outputs) == 3:
                layer.adapters.b[slot] = layer.adapters.b[slot].roll(layer.outputs[-1], 0)


@mutant(ADAPTERS)
class a_filled_slot_keeps_rows_of_the_adapter_before(PagedModelRunner):
    def load_adapter(self, slot: int, path: str) -> None:
        before = [(x.adapters.a[slot].clone(), x.adapters.b[slot].clone())
                  for x in self.adapters.layers]  # type: ignore[union-attr]
        super().load_adapter(slot, path)
        for layer, (a, b) in zip(self.adapters.layers, before, strict=True):  # type: ignore[union-attr]
            for now, old in ((layer.adapters.a[slot], a), (layer.adapters.b[slot], b)):
                now[:] = torch.where(now == 0, old, now) if now.ndim == 1 else now + 0.5 * old


control = Mutant()  # nothing is wrong with it
control.name, control._parts = "control", {}


# Models of embeddings: a runner with input and output types of its own.

@mutant("L1/embedding")
class counts_positions_over_the_step(EmbeddingRunner):
    @staticmethod
    def pack(lens: Any, tokens: Any) -> Any:
        packed = EmbeddingRunner.pack(lens, tokens)
        packed.arrays["positions"][...] = range(len(tokens))
        return packed


@mutant("L1/embedding")
class leaves_out_a_text(EmbeddingRunner):
    @staticmethod
    def pack(lens: Any, tokens: Any) -> Any:
        packed = EmbeddingRunner.pack(lens, tokens)
        packed.arrays["input_ids"][-lens[-1]:] = tokens[:lens[-1]]
        return packed


class _Embedder(EmbeddingRunner):
    def _vectors(self, m: Any, seen: list[Group]) -> torch.Tensor:
        """Of each text, the state behind its last token or the mean; attention joins the tokens of each of `seen`."""
        attention = TextAttention(self.model.attention_specs, seen, self.config.model.causal)
        hidden = self.model(m.input_ids, m.positions, ForwardContext(attention, m), None)
        return torch.cat([pool(group.of(hidden), self.embedding.pooling) for group in groups_of(m)])


@mutant("L3/embedding")
class sees_the_text_before(_Embedder):
    @torch.inference_mode()
    def execute_model(self, m: Any, *args: Any) -> Any:
        return EmbeddingOutput(embeddings=self.finish(self._vectors(m, [Group(0, 1, len(m.input_ids))])).contiguous())


@mutant("L3/embedding")
class normalises_the_step(_Embedder):
    @torch.inference_mode()
    def execute_model(self, m: Any, *args: Any) -> Any:
        pooled = self._vectors(m, groups_of(m))
        return EmbeddingOutput(embeddings=pooled / pooled.norm(dim=-1).mean())


@mutant("L5/embedding")
class embeds_with_a_part_of_each_sum(EmbeddingRunner):
    def __init__(self, config: Any, device: Any, communicator: Any) -> None:
        super().__init__(config, device, LocalCommunicator())


@mutant("L5/embedding")
class embeds_with_the_first_ranks_weights(EmbeddingRunner):
    def make_model(self, *args: Any) -> Any:
        topology, self.config = self.config.topology, dataclasses.replace(self.config, topology=dataclasses.replace(
            self.config.topology, rank=0))
        made = super().make_model(*args)
        self.config = dataclasses.replace(self.config, topology=topology)
        return made
