"""Quantised weights in the form that the kernels read: INT8 or INT4 values row by row, scales of groups of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hal.models.layers import Linear
from hal.weights.gguf import GgufBlocks
from hal.weights.grid import Grid, GridScheme
from runners.cpu.linears import INT4, INT8, MOST_INPUTS, GridWeight, Kernels

_BLOCK = 64  # inputs that the kernels read at once
_MOST_GROUP = 1024  # the sum of a group's products fits into 32 bits


def packed(layer: Linear, kernels: Kernels) -> GridWeight | None:
    """What the kernels read for a layer whose weight is not dense; None where they cannot."""
    scheme = layer.scheme
    if not kernels or layer.dtype != torch.bfloat16 or layer.in_size > MOST_INPUTS:
        return None
    if isinstance(scheme, GgufBlocks) and scheme.kind in ("Q4_0", "Q8_0"):
        return _arranged(_of_blocks(layer.weight, scheme.kind), layer, kernels)
    if isinstance(scheme, GridScheme) and scheme.inputs != "static" and "fp8" not in scheme.name:
        return _arranged(scheme.grid(layer), layer, kernels)
    return None


def _of_blocks(rows: torch.Tensor, kind: str) -> Grid:
    """Blocks of 32 values: a scale in fp16, then 32 bytes, or 16 bytes of which the lower bits come first."""
    out = rows.shape[0]
    blocks = rows.view(out, -1, 34 if kind == "Q8_0" else 18)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    values = blocks[..., 2:]
    if kind == "Q8_0":
        return Grid(values.contiguous().view(torch.int8).flatten(1), scales, 32, (out,))
    return Grid(torch.cat((values & 15, values >> 4), -1).flatten(1), scales, 32, (out,), torch.full_like(scales, 8.0))


def _arranged(grid: Grid, layer: Linear, kernels: Kernels) -> GridWeight | None:
    values, scales, zeros = grid.values, grid.scales, grid.zeros
    inputs = values.shape[1]
    group = 0 if scales.shape[1] == 1 else grid.group
    if grid.index is not None or values.is_floating_point() or (
            group and group != 32 and (group % _BLOCK or group > _MOST_GROUP)):
        return None
    if zeros is not None and values.dtype == torch.uint8 and _of_8_bits(layer):
        if not bool((zeros == 128).all()):
            return None
        values, zeros = (values.int() - 128).to(torch.int8), None
    values = F.pad(values, (0, -inputs % _BLOCK))
    if group:  # entries for all groups of a padded row
        pad = (0, values.shape[1] // group - scales.shape[1]) if values.shape[1] % group == 0 else (0, 0)
        scales, zeros = F.pad(scales, pad), None if zeros is None else F.pad(zeros, pad, value=8)
    scales = scales.float().contiguous()
    if zeros is None:
        if group == 32:  # the halves of a vector belong to two groups
            values = values.view(len(values), -1, 2, 4, 8).transpose(2, 3).flatten(1)
        return GridWeight(values.contiguous(), scales, None, layer.bias, kernels, kind=INT8, inputs=inputs, group=group)
    if not bool(((zeros >= 0) & (zeros <= 255) & (zeros == zeros.round())).all()):
        return None
    packed = values[:, 0::2] | values[:, 1::2] << 4
    plain = bool((zeros == 8).all())
    return GridWeight(packed.contiguous(), scales, None if plain else zeros.to(torch.uint8).contiguous(), layer.bias,
                      kernels, kind=INT4, inputs=inputs, group=group)


def _of_8_bits(layer: Linear) -> bool:
    return getattr(layer.scheme, "bits", 4) == 8
