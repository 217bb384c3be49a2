"""Adapters (LoRA, arXiv 2106.09685) of a model's linear layers: the memory of their slots, and which of them a step
uses.

A layer computes y = x W^T, and adds (x A^T) B^T of each token's adapter. The delta is added outside of the weight, so
the weight may be stored in any scheme. In a row-parallel layer x and A are parts, and the delta is a part of the sum
over the ranks as y is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hal.models.attention import SelfAttention
from hal.models.latent import LatentAttention
from hal.models.layers import Head, Linear
from hal.models.ops import Ops


class LayerAdapters:
    """The slots of one layer on this rank.

    Attributes:
        a: [slots, projections * rank, in]; the A of a merged layer's projections lie one behind the other. b: [slots,
            out, rank], already multiplied by the adapter's scale. Rows behind an adapter's own rank are zero, and all
            of a slot that holds none.
        step: of the whole model.
    """

    def __init__(self, layer: Linear, slots: int, rank: int, device: torch.device, step: StepAdapters) -> None:
        self.step, self.rank, self.outputs = step, rank, layer.outputs
        self.a = torch.zeros(slots, len(layer.outputs) * rank, layer.in_size, dtype=layer.dtype, device=device)
        self.b: torch.Tensor = layer.ops.adapter_memory(slots, sum(layer.outputs), rank, layer.dtype, device)


class StepAdapters:
    """Attributes: begun: the result of Ops.begin_adapters for the step that runs; None where no token has an adapter,
    and then the layers compute as if there were no slots."""

    begun: Any = None


class ModelAdapters:
    """The slots of all layers of a rank's part of a model.

    Attributes: layers: those that take adapters. width: values of a token between A and B, of the layer with most.
    """

    def __init__(self, model: nn.Module, ops: Ops, slots: int, rank: int, device: torch.device) -> None:
        self.ops, self.slots, self.rank, self.step = ops, slots, rank, StepAdapters()
        self.layers = list(adaptable(model))
        for layer in self.layers:
            layer.adapters = LayerAdapters(layer, slots, rank, device, self.step)
        self.width = slots * rank * max((len(layer.outputs) for layer in self.layers), default=0)

    def begin(self, slots: torch.Tensor | None) -> None:
        """Take over a step's `adapter_slots` [num_tokens], or None. The next forward pass of the model is the step's.
        """
        self.step.begun = None if slots is None else self.ops.begin_adapters(slots, self.slots)


def adaptable(model: nn.Module) -> Iterator[Linear]:
    """The layers that an adapter may change: all linear layers but the head, in latent attention the one whose weight
    is moved to the queries and behind the attention, and in gated attention the one whose outputs are moved."""
    moved: set[nn.Module | None] = {m.kv_up for m in model.modules() if isinstance(m, LatentAttention)}
    moved |= {m.qkv for m in model.modules() if isinstance(m, SelfAttention) and m.outputs is not None}
    heads = {"lm_head", model.config.embedding_name}  # type: ignore[union-attr]  # transformers' head is a Linear too
    for module in model.modules():
        if isinstance(module, Linear) and not isinstance(module, Head) and module not in moved and (
                module.spec.name not in heads):
            yield module


def target_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of each linear map of a whole model that an adapter may change, by its name in the checkpoint: its inputs and
    outputs."""
    return {p.name: (layer.spec.in_size, p.of or p.size) for layer in adaptable(model) for p in layer.spec.projections}
