"""The attention component: a model calls it once a layer, a backend supplies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from hal.contracts.inputs import PagedModelInput


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention on one rank: heads are counted after tensor-parallel sharding.

    Attributes:
        scale: multiplies q·k. window: tokens that a query sees, its own included; None sees all before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None


class LayerAttention(Protocol):
    """One step's attention, as a model sees it."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write k and v to the cache, then attend causally over each sequence's context.

        Args:
            layer: 0 for the first layer of this rank's stage.
            q: [num_tokens, num_heads, head_dim]. k, v: [num_tokens, num_kv_heads, head_dim]. Positions are applied.

        Returns:
            [num_tokens, num_heads * head_dim], in q's dtype. Rows of padding are finite, and otherwise arbitrary.
        """


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a model is called with beside tokens and positions: all that its layers may read of a step.

    Attributes:
        attention: of this step. model_input: its input; a layer reads the fields of step features from it.
    """

    attention: LayerAttention
    model_input: PagedModelInput


class Attention(Protocol):
    """What a backend supplies. `cache_shape` is one layer's cache; its dimension 1 counts blocks, so that blocks can
    be copied and swapped without knowing the rest; dimension 0 is K and V."""

    def cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Of every layer of this rank's stage (their specs agree in kv heads and head_dim)."""

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> LayerAttention:
        """Work that all layers of a step share (masks, gathered indices), done once."""


class MakeAttention(Protocol):
    def __call__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> Attention: ...
