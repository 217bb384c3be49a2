"""The table of rotary angles. It is computed once, when a model is built."""

from __future__ import annotations

import math

import torch

from hal.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] fp32, radians per position.

    "dynamic" (NTK) changes frequencies only in contexts longer than the model's max_position. No context here is
    longer, so "dynamic" equals "none". Sources: arXiv 2104.09864 (rotary); 2306.15595 (linear); Llama 3.1's release.
    """
    freqs = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.scaling == "linear":
        return freqs / rope.factor
    if rope.scaling == "llama3":
        # A wavelength below the high-frequency bound stays as it is. A wavelength above the low-frequency bound is
        # multiplied by the factor. Between the bounds the two frequencies are mixed, and `share`, the part of the
        # unchanged one, falls linearly.
        turns = rope.original_max_position * freqs / (2 * math.pi)
        share = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
        return share * freqs + (1.0 - share) * freqs / rope.factor
    return freqs


def cos_sin_table(rope: RopeConfig, head_dim: int, max_position: int, device: torch.device) -> torch.Tensor:
    """[max_position, head_dim] fp32: the cosines of the head_dim / 2 angles of a position, then their sines.

    The host computes the table, so that it has the same values on every device.
    """
    if device.type == "meta":
        return torch.empty(max_position, head_dim, device=device)
    angles = torch.arange(max_position, dtype=torch.float32).unsqueeze(1) * inverse_frequencies(rope, head_dim)
    return torch.cat((angles.cos(), angles.sin()), -1).to(device)
