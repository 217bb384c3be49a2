"""A mixture of experts as a part of a decoder layer.

Every tensor-parallel rank has all tokens of a step. So a rank computes with the part of the experts that it has: whole
experts along the axis ep, and a part of each inner layer along the other ranks of tp. One all_reduce sums the results,
and with them those of an MLP that computes every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from hal.config import Topology
from hal.model_config import ModelConfig
from hal.models.expert_weights import ExpertWeight, Storage, every_expert
from hal.models.layers import Build
from hal.models.mlp import GatedMLP
from hal.weights import LinearSpec, Projection
from hal.weights.dense import DENSE
from hal.weights.formats import mergeable
from hal.weights.sharding import ParameterSpec, StoredSlice

if TYPE_CHECKING:
    from hal.contracts.inputs import PagedModelInput


class ExpertNames(NamedTuple):
    """Names below that of the layer's block in the checkpoint.

    Attributes:
        parts: gate, up and down of an expert, whose tensors are stored one by one; None: the tensors of all experts are
            stored as one, gate and up in turns ("experts.gate_up_proj", as gpt-oss has it).
    """

    router: str = "gate"
    parts: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"


class ExpertLoads:
    """How many tokens each expert of a model was chosen for. Nothing here waits for the device.

    Attributes:
        counts: int64 [layers with experts, experts], over all ranks: each rank counts all of a step's choices.
    """

    def __init__(self, layers: Sequence[Experts]) -> None:
        router = layers[0].router
        self.counts = torch.zeros(len(layers), len(router), dtype=torch.int64, device=router.device)
        for place, layer in enumerate(layers):
            layer.loads, layer.place = self, place

    def begin(self, m: PagedModelInput) -> None:
        """Tell the real tokens of a step from padding."""
        at = torch.arange(len(m.positions), device=m.positions.device)
        self.real = (at < m.query_start_loc[-1]).long().unsqueeze(1)

    def add(self, place: int, chosen: torch.Tensor) -> None:
        """chosen: [n, experts of a token]."""
        self.counts[place].scatter_add_(0, chosen.long().flatten(), self.real.expand(chosen.shape).flatten())


class Experts(nn.Module):
    """The router and the experts of a layer. Sources: arXiv 2101.03961, 2401.04088.

    Args:
        name: in the checkpoint ("layers.0.mlp").

    Attributes:
        config: the model's ExpertsConfig.
        first, count: of the experts that this rank holds.
        gate_up: [count * 2 * size, hidden], of each expert the gate and then up. down: [count, hidden, size].
        gate_up_bias, down_bias: [count * 2 * size] and [count * hidden], or None. Of the ranks that share experts, one
            has the second.
        router: [all experts, hidden]. router_bias, correction: [all experts], or None.
        shared: the MLP that computes every token, or None; shared_gate: [1, hidden], or None.
        few_bits: whether the weights are stored in few bits. Then `layers` takes the place of gate_up and down. It has
            ExpertWeights: the experts' gate and up, as one or, where their schemes differ, as two, and then their down.
        packed: what the device made of all weights in few bits (see Ops.pack_experts), or None.
        stored: where the checkpoint has the experts.
        loads, place: where choices are counted, and the number of this layer there; None where nobody counts.
    """

    loads: ExpertLoads | None = None
    place: int
    gate_up: nn.Parameter
    down: nn.Parameter
    layers: Sequence[ExpertWeight]
    packed: Any = None

    def __init__(self, config: ModelConfig, build: Build, name: str, names: ExpertNames) -> None:
        super().__init__()
        c, e, t = config, config.experts, build.topology
        assert e is not None
        self.ops, self.communicator, self.eps, self.tp, self.config = build.ops, build.communicator, c.norm_eps, t.tp, e
        cut = t.tp // t.ep
        self.count, self.size = e.count // t.ep, e.size // cut
        self.first, place = t.ep_rank * self.count, t.tp_rank % cut
        wide = torch.float32 if e.wide else None
        self.router = build.replicated(f"{name}.{names.router}.weight", e.count, c.hidden_size, dtype=wide)
        self.router_bias = self.correction = None
        self.gate_up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if e.sigmoid:
            self.correction = build.replicated(f"{name}.{names.router}.e_score_correction_bias", e.count,
                                               dtype=torch.float32)
        self.stored = Storage(f"{name}.experts", names.parts, e.count)
        self._hold(build, Topology(cut, 1, place), c.hidden_size)
        if e.bias:
            self.router_bias = build.replicated(f"{name}.{names.router}.bias", e.count)
            self._hold_biases(build, f"{name}.experts", e.count, e.size, place * self.size, c.hidden_size)
        self.shared = self.shared_gate = None
        if e.shared_size:
            self.shared = GatedMLP(c, build, f"{name}.{names.shared}", e.shared_size)
        if e.shared_gate:
            self.shared_gate = build.replicated(f"{name}.{names.shared}_gate.weight", 1, c.hidden_size)

    def _hold(self, build: Build, cut: Topology, hidden: int) -> None:
        """Declare the weights of this rank's experts, each of which the ranks of `cut` share."""
        gate, up, down = (self.stored.projection(self.first, place) for place in range(3))
        ups = LinearSpec(hidden, (Projection(gate, self.config.size), Projection(up, self.config.size)), "out")
        backs = LinearSpec(self.config.size, (Projection(down, hidden),), "in")
        self.few_bits = any(build.schemes(name) is not DENSE for name in (gate, up, down))
        if self.few_bits:
            specs = [ups] if mergeable(ups, build.schemes) else [
                dataclasses.replace(ups, projections=(p,)) for p in ups.projections]
            mine = range(self.first, self.first + self.count)
            self.layers = cast("Sequence[ExpertWeight]", nn.ModuleList(
                ExpertWeight(build, spec, self.stored, place, mine, cut)
                for spec, place in zip((*specs, backs), (*range(len(specs)), 2), strict=True)))
            return
        size, start, wide, back = self.size, cut.rank * self.size, list[StoredSlice](), list[ParameterSpec]()
        for i in range(self.first, self.first + self.count):
            whole = StoredSlice("weight", (self.config.size, hidden), 0, size, start)
            wide += [self.stored.locate(whole, place, i) for place in (0, 1)]
            found = self.stored.locate(dataclasses.replace(whole, shape=(hidden, self.config.size), dim=1), 2, i)
            back.append(ParameterSpec(1, 1, (found,)))
        self.gate_up = build.parameter((2 * self.count * size, hidden), ParameterSpec(0, 0, tuple(wide)))
        self.down = build.parameter((self.count, hidden, size), ParameterSpec(0, 0, (), each=tuple(back)))

    def biases(self) -> list[torch.Tensor | None]:
        """[count, outputs] for each of `layers`; None where there is none."""
        wide, back = self.gate_up_bias, self.down_bias
        of_wide: list[torch.Tensor | None] = [None] * (len(self.layers) - 1)
        if wide is not None:
            of_wide = list(torch.split(wide.view(self.count, -1), [sum(w.outputs) for w in self.layers[:-1]], 1))
        return [*of_wide, None if back is None else back.view(self.count, -1)]

    def compute_one(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """x [n, hidden] -> [n, hidden], of this rank's expert with this index, whose weights are in few bits."""
        ops = self.ops
        *first, last = (w.expert(index, b) for w, b in zip(self.layers, self.biases(), strict=True))
        inner = torch.cat([ops.linear(x, w) for w in first], -1) if len(first) > 1 else ops.linear(x, first[0])
        inner = ops.silu_mul(inner) if self.config.limit is None else ops.expert_gated(inner, self.config.limit)
        return ops.linear(inner, last)

    def compute_every(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """See hal.models.expert_weights.every_expert."""
        return every_expert(x, share, self.layers, self.biases(),
                            lambda inner: self.ops.expert_gated(inner, self.config.limit))

    def decode(self) -> None:
        """Replace the weights in few bits by dense ones in the model's dtype."""
        *first, last = self.layers
        wide = torch.cat([w.decoded(i) for i in range(self.count) for w in first])
        back = torch.stack([last.decoded(i) for i in range(self.count)])
        self.gate_up, self.down = (nn.Parameter(x, requires_grad=False) for x in (wide, back))
        del self.layers
        self.few_bits = False

    def _hold_biases(self, build: Build, name: str, count: int, whole: int, start: int, hidden: int) -> None:
        mine = range(self.first, self.first + self.count)
        wide = tuple(StoredSlice(f"{name}.gate_up_proj_bias", (count, 2 * whole), 1, self.size, start, entry=i, step=2,
                                 offset=offset) for i in mine for offset in (0, 1))
        self.gate_up_bias = build.parameter((2 * self.count * self.size,), ParameterSpec(0, 0, wide))
        if start == 0:
            back = tuple(StoredSlice(f"{name}.down_proj_bias", (count, hidden), 1, hidden, entry=i) for i in mine)
            self.down_bias = build.parameter((self.count * hidden,), ParameterSpec(0, 0, back))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor | None,
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """As GatedMLP."""
        ops = self.ops
        y, x, residual, chosen = ops.mixture(x, residual, norm, self)
        if self.loads is not None:
            self.loads.add(self.place, chosen)
        if self.shared is not None:
            beside = self.shared.down.unsummed(ops.silu_mul(self.shared.gate_up(x)))
            if self.shared_gate is not None:
                beside = beside * F.linear(x, self.shared_gate).sigmoid()
            y = y + beside
        return (self.communicator.all_reduce(y) if self.tp > 1 else y), residual
