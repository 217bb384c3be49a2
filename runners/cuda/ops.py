"""The models' operations in Triton, and linears of one row chosen by measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from hal.models.layers import Linear
from hal.models.ops import Ops
from runners.cuda.kernels import elementwise
from runners.cuda.kernels.gemv import TILES, Tile, gemv

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_ROUNDS, _MOVED = 5, 1 << 28  # replays; bytes of weights in one, so that few come from the cache


class CudaOps(Ops):
    """Attributes: tiles: by weight shape, what the matrix-vector kernel is run with; None where cuBLAS is faster.
    gated: the same for a layer whose outputs are a gate and the other factor, with their product in one kernel."""

    def __init__(self) -> None:
        self.tiles: dict[tuple[int, ...], Tile | None] = {}
        self.gated: dict[tuple[int, ...], Tile | None] = {}
        self._weights: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def pack_linear(self, layer: Linear) -> None:
        if layer.weight.dtype != torch.float32:
            self._weights.setdefault(tuple(layer.weight.shape), []).append(layer.weight.data)

    @torch.inference_mode()
    def choose_tiles(self) -> None:
        """By measurement on the model's own weights."""
        for shape, weights in self._weights.items():
            some = weights[:max(_MOVED // (weights[0].numel() * weights[0].itemsize), 2)]
            self.tiles[shape] = best = min((None, *TILES), key=lambda tile: _milliseconds(self._product(tile), some))
            if shape[0] % 2 == 0:
                self.gated[shape] = min((None, *TILES), key=lambda tile: _milliseconds(self._gated(tile, best), some))
        self._weights.clear()

    @staticmethod
    def _product(tile: Tile | None) -> Product:
        return F.linear if tile is None else lambda x, weight: gemv(x, weight, None, tile)

    def _gated(self, tile: Tile | None, best: Tile | None) -> Product:
        if tile is None:
            return lambda x, weight: self.silu_mul(self._product(best)(x, weight))
        return lambda x, weight: gemv(x, weight, None, tile, gated=True)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] == 1:
            tile = self.tiles.get(weight.shape)
            if tile is not None:
                return gemv(x, weight, bias, tile)
        return F.linear(x, weight, bias)

    def gated_linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        tile = self.gated.get(layer.weight.shape) if x.shape[0] == 1 else None
        return super().gated_linear(layer, x) if tile is None else gemv(x, layer.weight, layer.bias, tile, gated=True)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return elementwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                     ) -> tuple[torch.Tensor, torch.Tensor]:
        return elementwise.add_rms_norm(x, residual, weight, eps)

    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        return positions, table

    def rotary(self, heads: torch.Tensor, begun: Any) -> torch.Tensor:
        return elementwise.rotary(heads, *begun)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return elementwise.silu_mul(gate_up)


def _milliseconds(call: Product, weights: list[torch.Tensor]) -> float:
    """One row times each of the weights, as a graph runs them: the least of a few replays."""
    x = torch.ones(1, weights[0].shape[1], dtype=weights[0].dtype, device=weights[0].device)
    for weight in weights:
        call(x, weight)
    torch.cuda.synchronize()
    graph, spent = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for weight in weights:
            call(x, weight)
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return min(spent)
