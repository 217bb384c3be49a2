"""The models' operations in Triton, and linears of one row chosen by measurement."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hal.models.layers import Linear
from hal.models.ops import Ops
from runners.cuda.kernels import elementwise
from runners.cuda.kernels.gemv import TILES, Tile, gemv

_ROUNDS = 20


class CudaOps(Ops):
    """Attributes: tiles: by weight shape, what the matrix-vector kernel is run with; None where cuBLAS is faster."""

    def __init__(self) -> None:
        self.tiles: dict[tuple[int, ...], Tile | None] = {}

    def pack_linear(self, layer: Linear) -> None:
        weight = layer.weight
        if weight.shape not in self.tiles and weight.dtype != torch.float32:
            self.tiles[weight.shape] = fastest_tile(weight.data)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] == 1:
            tile = self.tiles.get(weight.shape)
            if tile is not None:
                return gemv(x, weight, bias, tile)
        return F.linear(x, weight, bias)

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


def fastest_tile(weight: torch.Tensor) -> Tile | None:
    """Measured on this device with other weights in between, so that none come from the cache."""
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    flush = torch.empty(1 << 27, dtype=torch.uint8, device=weight.device)

    def seconds(tile: Tile | None) -> float:
        spent = []
        for _ in range(_ROUNDS):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            F.linear(x, weight) if tile is None else gemv(x, weight, None, tile)
            end.record()
            end.synchronize()
            spent.append(begin.elapsed_time(end))
        return sorted(spent)[_ROUNDS // 4]

    return min((None, *TILES), key=seconds)
