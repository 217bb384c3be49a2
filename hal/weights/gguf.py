"""Weights in GGUF's blocks: rows of inputs in blocks, each of some bytes that hold its scales and its values.

Source of the layouts: the GGML project's ggml-common.h and the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hal.weights.base import Dim, LinearSpec, Scheme, WeightTensor

if TYPE_CHECKING:
    from hal.models.layers import Linear

Decode = Callable[[torch.Tensor], torch.Tensor]


def _half(blocks: torch.Tensor, at: int, count: int = 1) -> torch.Tensor:
    """fp16 numbers of a block -> [n, count] fp32. By arithmetic, since XLA cannot take bytes for another type."""
    low, high = blocks[:, at:at + 2 * count].int().view(-1, count, 2).unbind(-1)
    powers = torch.tensor([2.0 ** (max(e, 1) - 25) for e in range(32)], device=blocks.device)
    exponent, mantissa = high >> 2 & 31, (high & 3) << 8 | low
    value = (mantissa + 1024 * (exponent > 0)).float() * powers[exponent.long()]
    return torch.where(high > 127, -value, value)


def _signed(bytes_: torch.Tensor) -> torch.Tensor:
    """Bytes as what they are in two's complement, int32."""
    return (bytes_.int() ^ 128) - 128


def _nibbles(bytes_: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., 2 * n]: the lower bits of all, then the upper ones."""
    return torch.cat((bytes_ & 15, bytes_ >> 4), -1)


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * _signed(b[:, 2:])


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _six_bits(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight scales and the eight minima of a block of Q4_K or Q5_K, [n, 8] fp32."""
    d, dmin = _half(b, 0, 2).unsqueeze(-1).unbind(1)
    low, middle, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), -1)
    minima = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), -1)
    return d * scales, dmin * minima


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bits(b)
    values = _nibbles(b[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32).float()  # [n, 8, 32]
    return (values * scales.unsqueeze(-1) - minima.unsqueeze(-1)).flatten(1)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bits(b)
    values = _nibbles(b[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    fifth = b[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8, device=b.device).view(1, 8, 1) & 1
    return ((values + fifth * 16).float() * scales.unsqueeze(-1) - minima.unsqueeze(-1)).flatten(1)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).flatten(1)  # [n, 256]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=b.device).view(1, 1, 4, 1)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).flatten(1)
    scales = _half(b, 208) * _signed(b[:, 192:208])
    values: torch.Tensor = ((low | high << 4).float() - 32) * scales.repeat_interleave(16, 1)
    return values


BLOCKS: dict[str, tuple[int, int, Decode]] = {  # values and bytes of a block
    "Q8_0": (32, 34, _q8_0), "Q4_0": (32, 18, _q4_0), "Q4_K": (256, 144, _q4_k), "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k)}


@dataclass(frozen=True)
class GgufBlocks(Scheme):
    """Attributes: kind: of BLOCKS."""

    kind: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"gguf-{self.kind}")

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        values, size, _ = BLOCKS[self.kind]
        return (WeightTensor("weight", (Dim("out"), Dim("in", per=values, holds=size)), "uint8"),)

    def dequantize(self, layer: Linear) -> torch.Tensor:
        _, size, decode = BLOCKS[self.kind]
        rows = layer.weight
        return decode(rows.reshape(-1, size)).view(len(rows), -1).to(layer.dtype)
