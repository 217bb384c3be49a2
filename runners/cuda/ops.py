"""The operations of models in Triton. For linears of one row the fastest kernel is chosen by measurement."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import nn

from hal.contracts.attention import LayerAttention
from hal.models.expert_weights import ExpertWeight
from hal.models.experts import Experts
from hal.models.layers import Linear, Unmerged
from hal.models.ops import HeadNorms, Ops
from hal.weights.grid import GridScheme
from hal.weights.mxfp4 import Mxfp4Scheme
from runners.cuda.attention import CudaStep
from runners.cuda.kernels import adapters, elementwise, experts, few_bit_experts, one_token
from runners.cuda.kernels.few_bits import MOST_ROWS, FewBits, few_bits, multiply, one_row, round_rows, stacked
from runners.cuda.kernels.gemv import TILES, Norm, Tile, gemv

_ROUTER = Tile(1, 2048, 2)  # a router has few rows
_EXACT_ROWS = 16  # of inputs to FP8 weights, which are not rounded: reading the weights is what takes time
_REARRANGED = 1 << 25  # weights of experts at once
_ROUNDS, _MOVED = 20, 1 << 28  # replays; bytes of weights in one, so that few come from the cache


class Use(NamedTuple):
    """A use of a linear layer with one row: the weight's shape, and the operations that the same kernel does."""

    shape: tuple[int, ...]
    gated: bool = False
    normed: bool = False


class CudaOps(Ops):
    """Attributes: tiles: by use, the tile that the matrix-vector kernel runs with, or None if the kernel is slower than
    the operations that it would replace. It is measured when a use first occurs, on the model's own weights, until
    `settle` is called."""

    schemes = None  # any but the dense one by its own arithmetic

    def __init__(self) -> None:
        self.tiles: dict[Use, Tile | None] = {}
        self._weights: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._adapted_tiles: dict[tuple[int, ...], torch.Tensor] = {}  # by a layer's outputs
        self._inner: torch.Tensor | None = None  # of the layer whose `adapt` comes next, where it has begun

    def pack_linear(self, layer: Linear) -> None:
        layer.packed = _packed([layer])
        for tensor in layer.scheme.tensors(layer.spec) if layer.packed is not None else ():
            delattr(layer, tensor.name)
        if layer.is_dense and layer.weight.dtype != torch.float32:
            self._weights.setdefault(tuple(layer.weight.shape), []).append(layer.weight.data)

    def settle(self) -> None:
        """Measure nothing from now on."""
        self._weights.clear()

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if layer.adapters is not None and layer.adapters.step.begun is not None and (
                x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._begin_beside(x, layer)
        if not layer.is_dense:
            return super().linear(x, layer) if layer.packed is None else self._few_bits(x, layer, layer.packed)
        return self._apply(x, layer.weight, layer.bias, Use(layer.weight.shape), None)[0]

    def norm_linear(self, layer: Linear | Unmerged, x: torch.Tensor, residual: torch.Tensor | None,
                    weight: torch.Tensor, eps: float, *, gated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(layer, Unmerged) and not layer.reduce and (
                layer.adapters is None or layer.adapters.step.begun is None):
            norm = Norm(weight, eps, residual)
            if layer.is_dense:
                return self._apply(x, layer.weight, layer.bias, Use(layer.weight.shape, gated, True), norm)
            if len(x) == 1 and layer.packed is not None and layer.packed.takes_norm:
                y, total = one_row(x, layer.packed, layer.bias, norm=norm)
                return self.silu_mul(y) if gated else y, total
        return super().norm_linear(layer, x, residual, weight, eps, gated=gated)

    def adapter_memory(self, slots: int, out: int, rank: int, dtype: torch.dtype, device: torch.device,
                       ) -> torch.Tensor:
        return torch.zeros(slots, out, rank, dtype=dtype, device=device)

    def begin_adapters(self, slots: torch.Tensor, count: int) -> Any:
        return adapters.by_slot(slots, count)

    def adapt(self, y: torch.Tensor, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        held, step = layer.adapters, layer.adapters.step.begun
        if held.outputs not in self._adapted_tiles:  # in the warm-up, before anything is captured
            self._adapted_tiles[held.outputs] = adapters.tiles_of(held.outputs, x.device)
        if not len(x):
            return y
        inner, self._inner = self._inner, None
        beside = inner is not None
        if inner is None:
            inner = adapters.inner_of(x, held.a)
            adapters.shrink(x, held.a, step, inner)
        else:
            torch.cuda.current_stream().wait_stream(_side(x.device))
        return adapters.expand(y, inner, held.b, step, self._adapted_tiles[held.outputs], alone=beside)

    def _begin_beside(self, x: torch.Tensor, layer: Linear) -> None:
        """Compute x A^T on another stream while the layer's own product runs. `adapt`, which comes next, waits for it.
        Only in a graph: elsewhere the host's work for two streams takes longer than the kernel."""
        self._inner, other = adapters.inner_of(x, layer.adapters.a), _side(x.device)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            adapters.shrink(x, layer.adapters.a, layer.adapters.step.begun, self._inner, alone=True)

    def _few_bits(self, x: torch.Tensor, layer: Linear, weight: FewBits) -> torch.Tensor:
        """Few rows are multiplied by the weight as it is stored, and are not rounded themselves. Of many rows, those of
        FP8 are rounded as their scheme says, so that tensor cores multiply FP8; other weights are dequantised."""
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        rounded = len(x) > _EXACT_ROWS and _multiplies_fp8(x, layer, weight)
        if 0 < len(x) <= MOST_ROWS and not rounded:
            return multiply(x, weight, layer.bias)
        if rounded:
            values, scales = round_rows(x, weight.values.shape[1])
            y = torch._scaled_mm(values, weight.values.t(), scale_a=scales, scale_b=weight.scales.float(),
                                 out_dtype=x.dtype, use_fast_accum=True)
            return y if layer.bias is None else y + layer.bias
        return F.linear(x, weight.dequantized(x.dtype), layer.bias)

    def _apply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, use: Use, norm: Norm | None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product, and x + residual."""
        if x.shape[0] == 1:
            if use not in self.tiles and use.shape in self._weights:
                self.tiles[use] = self._measured(use)
            tile = self.tiles.get(use)
            if tile is not None:
                return gemv(x, weight, bias, tile, gated=use.gated, norm=norm)
        return self._unfused(x, weight, bias, use, norm)

    def _unfused(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, use: Use, norm: Norm | None,
                 ) -> tuple[torch.Tensor, torch.Tensor]:
        if norm is not None:
            if norm.residual is None:
                x, total = self.rms_norm(x, norm.weight, norm.eps), x
            else:
                x, total = self.add_rms_norm(x, norm.residual, norm.weight, norm.eps)
            return self._apply(x, weight, bias, use._replace(normed=False), None)[0], total
        if use.gated:
            return self.silu_mul(self._apply(x, weight, bias, Use(use.shape), None)[0]), x
        return F.linear(x, weight, bias), x

    @torch.inference_mode()
    def _measured(self, use: Use) -> Tile | None:
        weights = self._weights[use.shape]
        some = weights[:max(_MOVED // (weights[0].numel() * weights[0].itemsize), 2)]
        x = torch.ones(1, use.shape[1], dtype=some[0].dtype, device=some[0].device)
        norm = Norm(x[0], 1e-5, x) if use.normed else None
        graphs: dict[Tile | None, torch.cuda.CUDAGraph] = {}
        for tile in (None, *TILES):
            graphs[tile] = _captured(
                functools.partial(self._unfused, x, bias=None, use=use, norm=norm) if tile is None else
                functools.partial(gemv, x, bias=None, tile=tile, gated=use.gated, norm=norm), some)
        spent: dict[Tile | None, float] = dict.fromkeys(graphs, math.inf)
        for _ in range(_ROUNDS):  # the candidates take turns, since clocks drift
            for tile, graph in graphs.items():
                spent[tile] = min(spent[tile], _milliseconds(graph))
        return min(spent, key=lambda tile: spent[tile])

    def mixture(self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor | None, layer: Experts,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        e = layer.config
        if (len(x) != 1 or norm is None or layer.few_bits or x.dtype == torch.float32 or layer.router.dtype != x.dtype
                or e.sigmoid or e.top_groups < e.groups):
            return super().mixture(x, residual, norm, layer)
        normed, block = torch.empty_like(x), triton.next_power_of_2(x.shape[1])
        logits, total = gemv(x, layer.router, layer.router_bias, Tile(max(8192 // block, 1), block, 4),
                             norm=Norm(norm, layer.eps, residual, normed))
        y, chosen = one_token.experts(normed, logits, _held(layer), e.per_token, e.normalise, e.scaling)
        return y, normed, total, chosen

    def route(self, x: torch.Tensor, layer: Experts) -> tuple[torch.Tensor, torch.Tensor]:
        e = layer.config
        if e.sigmoid or e.top_groups < e.groups:
            return super().route(x, layer)
        x = x.to(layer.router.dtype)
        if len(x) == 1 and x.dtype != torch.float32:
            logits = gemv(x, layer.router, layer.router_bias, _ROUTER)[0]
        else:
            logits = F.linear(x, layer.router, layer.router_bias)
        return experts.route(logits, e.per_token, e.normalise, e.scaling)

    def pack_experts(self, layer: Experts) -> None:
        """Where no kernel has the form, experts stay as the reference reads them."""
        packed = [_stacked(weight) for weight in layer.layers]
        if len(packed) == 2 and packed[0] is not None and packed[1] is not None:
            for weight in layer.layers:
                weight.release()
            layer.packed = few_bit_experts.Stacks(packed[0], packed[1], layer.gate_up_bias, layer.down_bias,
                                                  layer.first, layer.count, layer.config.limit)

    def experts(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, layer: Experts) -> torch.Tensor:
        if layer.packed is not None:
            return few_bit_experts.experts(x, weights, chosen, layer.packed)
        if layer.few_bits:
            return super().experts(x, weights, chosen, layer)
        return experts.experts(x, weights, chosen, _held(layer))

    def warm_experts(self, model: nn.Module, most: int) -> None:
        """Compile what the experts of a step of up to `most` tokens may need."""
        forms = {None if m.packed is None else m.packed.form: m for m in model.modules()
                 if isinstance(m, Experts) and (m.packed is not None or not m.few_bits)}
        for layer in forms.values():
            dtype = layer.gate_up.dtype if layer.packed is None else layer.layers[0].dtype
            k, count = layer.config.per_token, layer.count
            choices = 1, 17, count + 1, experts.FEW + 1, 96 * count + experts.FEW
            for tokens in {min(-(-n // k), most) for n in choices}:
                x = layer.router.new_zeros(tokens, layer.router.shape[1], dtype=dtype)
                self.experts(x, *self.route(x, layer), layer)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return elementwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                     ) -> tuple[torch.Tensor, torch.Tensor]:
        return elementwise.add_rms_norm(x, residual, weight, eps)

    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        return positions, table

    def rotary(self, heads: torch.Tensor, begun: Any) -> torch.Tensor:
        return elementwise.rotary(heads, *begun)

    def rotary_attention(self, attention: LayerAttention, layer: int, qkv: torch.Tensor, num_kv_heads: int,
                         begun: Any, norms: HeadNorms | None = None) -> torch.Tensor:
        if isinstance(attention, CudaStep):
            return attention.rotary(layer, qkv, num_kv_heads, begun[1], norms)
        return super().rotary_attention(attention, layer, qkv, num_kv_heads, begun, norms)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return elementwise.silu_mul(gate_up)


def _held(layer: Experts) -> experts.Held:
    return experts.Held(layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias, layer.first, layer.count,
                        layer.config.limit)


def _packed(layers: Sequence[Linear]) -> FewBits | None:
    """The outputs of layers of the same form as those of one weight, or None where a kernel does not have the form."""
    grids = [w.scheme.grid(w) if isinstance(w.scheme, GridScheme) else w.scheme.codes(w) for w in layers
             if isinstance(w.scheme, GridScheme | Mxfp4Scheme)]
    if not grids or (len(grids) > 1 and any(grid.index is not None for grid in grids)):
        return None
    whole = grids[0]
    if len(grids) > 1:
        values, scales = torch.cat([grid.values for grid in grids]), torch.cat([grid.scales for grid in grids])
        zeros = [grid.zeros for grid in grids if grid.zeros is not None]
        whole = replace(whole, values=values, scales=scales, zeros=torch.cat(zeros) if zeros else None)
    return few_bits(whole, isinstance(layers[0].scheme, Mxfp4Scheme))


def _stacked(weight: ExpertWeight) -> FewBits | None:
    """The weights of all experts. Some experts at a time are rearranged, which bounds the memory."""
    some = max(_REARRANGED // (sum(weight.outputs) * weight.in_size), 1)
    indices = range(len(weight.experts))
    return stacked([_packed([weight.expert(i, None) for i in indices[at:at + some]]) for at in indices[::some]])


def _multiplies_fp8(x: torch.Tensor, layer: Linear, weight: FewBits) -> bool:
    """Whether tensor cores multiply rounded inputs by the weight: PyTorch has it for scales of rows, with results in
    bfloat16."""
    return (weight.values.dtype == torch.float8_e4m3fn and layer.scheme.inputs in ("token", "tensor")
            and len(weight.scales) == 1 and x.dtype == torch.bfloat16
            and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)
            and weight.values.shape[0] % 16 == 0 and weight.values.shape[1] % 16 == 0)


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _captured(call: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
    """Multiply one row by each of the weights, in the order of a step's graph."""
    for weight in weights:
        call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for weight in weights:
            call(weight)
    return graph


def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
