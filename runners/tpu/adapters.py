"""The slots of adapters on an XLA device. Programs take them as arguments, so that a load compiles nothing."""

from __future__ import annotations

from typing import Any

import torch

from hal.adapters.files import slot_values
from hal.adapters.layers import ModelAdapters
from hal.config import EngineConfig, Topology
from hal.models.causal_lm import CausalLM
from runners.tpu import lowering


class TpuAdapters(ModelAdapters):
    """With several shares (see runners.tpu.spmd), the tensors that ranks would cut have one more dimension in front: A
    of row-parallel layers, and B of column-parallel ones. The host keeps a copy of all slots, from which a load makes
    the device's tensors anew."""

    def __init__(self, model: CausalLM, engine: EngineConfig, pp_rank: int, mesh: Any) -> None:
        super().__init__(model, model.ops, engine.max_adapters, engine.max_adapter_rank, torch.device("cpu"))
        self.model, self.mesh = model, mesh
        self.ranks = [t for t in Topology(engine.tp, engine.pp).every_rank() if t.pp_rank == pp_rank]
        self.held = {}
        for layer in self.layers:
            cut = (layer.reduce, layer.spec.sharded == "out" and engine.tp > 1)
            self.held[layer] = [w[None].repeat(engine.tp, 1, 1, 1) if shares else w
                                for w, shares in zip((layer.adapters.a, layer.adapters.b), cut, strict=True)]
            self._place(layer)

    def tensors(self) -> list[torch.Tensor]:
        return [w for layer in self.layers for w in (layer.adapters.a, layer.adapters.b)]

    def load(self, slot: int, path: str) -> None:
        """See ModelRunnerBase.load_adapter."""
        for i, topology in enumerate(self.ranks):
            for layer, *values in slot_values(self.model, self, path, topology):
                for held, value in zip(self.held[layer], values, strict=True):
                    (held[i] if held.ndim == 4 else held)[slot] = value
        for layer in self.layers:
            self._place(layer)

    def _place(self, layer: Any) -> None:
        layer.adapters.a, layer.adapters.b = (lowering.place(w, self.mesh, 0 if w.ndim == 4 else None)
                                              for w in self.held[layer])
