"""The tables of rotary angles. They are computed once, when a model is built."""

from __future__ import annotations

import math

import torch

from hal.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, longest: int = 0) -> torch.Tensor:
    """[rotary_dim / 2] fp32, radians per position; `longest` is the engine's longest sequence, in tokens.

    "dynamic" (NTK) changes frequencies only in contexts longer than the model's max_position. No context here is
    longer, so "dynamic" equals "none". Sources: arXiv 2104.09864 (rotary); 2306.15595 (linear); Llama 3.1's release;
    2309.00071 (yarn); 2402.13753 (longrope).
    """
    dim = rope.rotary_dim or head_dim
    freqs = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.scaling == "linear":
        return freqs / rope.factor
    if rope.scaling == "llama3":
        # A wavelength below the high-frequency bound stays as it is. A wavelength above the low-frequency bound is
        # multiplied by the factor. Between the bounds the two frequencies are mixed, and `share`, the part of the
        # unchanged one, falls linearly.
        turns = rope.original_max_position * freqs / (2 * math.pi)
        share = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
        return share * freqs + (1.0 - share) * freqs / rope.factor
    if rope.scaling == "yarn":
        # The same, but the share falls with the number of the dimension, between those that make beta_fast and
        # beta_slow turns over the original context.
        low, high = (dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
                     for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        at = torch.arange(dim // 2, dtype=torch.float32)
        share = 1.0 - ((at - low) / ((high - low) or 0.001)).clamp(0.0, 1.0)
        return share * freqs + (1.0 - share) * freqs / rope.factor
    if rope.scaling == "longrope":
        return freqs / torch.tensor(rope.long_factors if longest > rope.original_max_position else rope.short_factors)
    return freqs


def cos_sin_table(rope: RopeConfig, head_dim: int, max_position: int, device: torch.device, longest: int = 0,
                  ) -> torch.Tensor:
    """[max_position, head_dim] fp32: the cosines of the head_dim / 2 angles of a position, then their sines. Angles
    behind the first rotary_dim / 2 are zero. `longest` is the engine's longest sequence; 0: max_position.

    The host computes the table, so that it has the same values on every device.
    """
    if device.type == "meta":
        return torch.empty(max_position, head_dim, device=device)
    freqs = inverse_frequencies(rope, head_dim, longest or max_position)
    angles = torch.arange(max_position, dtype=torch.float32).unsqueeze(1) * freqs
    rest = head_dim // 2 - len(freqs)
    cos, sin = (torch.nn.functional.pad(x.mul_(rope.attention_factor), (0, rest), value=fill)
                for x, fill in ((angles.cos(), 1.0), (angles.sin(), 0.0)))
    return torch.cat((cos, sin), -1).to(device)


def head_order(rope: RopeConfig, head_dim: int) -> list[int] | None:
    """The order of a head's entries in which its rotary embedding pairs i and i + head_dim / 2: at each place, the
    entry that stands there. With queries and keys in this order one operation computes every rotary embedding, since
    q·k does not depend on the order. None: the entries are in it already."""
    dim, half = rope.rotary_dim or head_dim, head_dim // 2
    if dim == head_dim and not rope.interleaved:
        return None
    entries = range(dim)
    first, second = (entries[::2], entries[1::2]) if rope.interleaved else (entries[:dim // 2], entries[dim // 2:])
    middle = dim + half - dim // 2
    return [*first, *range(dim, middle), *second, *range(middle, head_dim)]
