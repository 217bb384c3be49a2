"""Attention over whole texts without a cache, in plain PyTorch for any device.

A step holds the texts one behind another, and the engine puts texts of similar lengths into a step. Adjacent texts of
equal length are computed as one batch, so nothing is padded, and a text's result does not depend on the other texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hal.contracts.attention import AttentionSpec, refuse_unsupported
from hal.contracts.embedding import EmbeddingInput
from hal.schema.packed import on_host


class Group(NamedTuple):
    """Adjacent texts of one length: `texts` of them, each of `length` tokens, from the token `start` on."""

    start: int
    texts: int
    length: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, ...] -> the group's own tokens [texts, length, ...], a view."""
        return x[self.start:self.start + self.texts * self.length].view(self.texts, self.length, *x.shape[1:])


def groups_of(m: EmbeddingInput) -> list[Group]:
    """The texts of a step without padding, in order."""
    found: list[Group] = []
    at = 0
    for length in on_host(m, "seq_lens").tolist():
        if found and found[-1].length == length:
            found[-1] = found[-1]._replace(texts=found[-1].texts + 1)
        else:
            found.append(Group(at, 1, length))
        at += length
    return found


class TextAttention:
    """One step's attention, called by a model in each layer as hal.contracts.attention.LayerAttention says, but that
    nothing is written to a cache.

    Args:
        causal: a token sees the tokens before it alone. Without it, a window reaches to both sides.

    Raises:
        ConfigError: a layer has a softcap, sinks, or values of another size than keys.
    """

    def __init__(self, specs: Sequence[AttentionSpec], groups: Sequence[Group], causal: bool) -> None:
        refuse_unsupported(specs, "the attention over whole texts")
        self.specs, self.groups, self.causal = specs, groups, causal
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec = self.specs[layer]
        parts = []
        for group in self.groups:
            queries, keys, values = (group.of(x).transpose(1, 2) for x in (q, k, v))  # [texts, heads, length, head_dim]
            if (shared := spec.num_heads // spec.num_kv_heads) > 1:
                keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))
            mask = self._mask(spec.window, group.length, q.device)
            out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=spec.scale,
                                                 is_causal=self.causal and mask is None)
            parts.append(out.transpose(1, 2).reshape(group.texts * group.length, -1))
        return torch.cat(parts)

    def _mask(self, window: int | None, length: int, device: torch.device) -> torch.Tensor | None:
        """bool [length, length], true where a token sees another one; None where the window holds the whole text."""
        if window is None or window >= length:
            return None
        if (window, length) not in self._masks:
            at = torch.arange(length, device=device)
            self._masks[window, length] = visible(at[:, None] - at, window, self.causal)
        return self._masks[window, length]


def visible(distance: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor:
    """Whether a token sees another one that stands `distance` tokens before it (behind it where that is negative)."""
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)
