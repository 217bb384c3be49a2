"""A mixture of experts as a part of a decoder layer.

Every tensor-parallel rank has all tokens of a step. So a rank computes with the part of the experts that it has: whole
experts along the axis ep, and a part of each inner layer along the other ranks of tp. One all_reduce sums the results,
and with them those of an MLP that computes every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hal.errors import ConfigError
from hal.model_config import ModelConfig
from hal.models.layers import Build
from hal.models.mlp import GatedMLP, apply_norm
from hal.weights.mxfp4 import BLOCK, decoded
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
        gate_up: [count * 2 * size, hidden], of each expert the gate and then up. down: [count * size, hidden].
        gate_up_bias, down_bias: [count * 2 * size] and [count * hidden], or None. Of the ranks that share experts, one
            has the second.
        router: [all experts, hidden]. router_bias, correction: [all experts], or None.
        shared: the MLP that computes every token, or None; shared_gate: [1, hidden], or None.
        packed: shapes and declarations of uint8 tensors that the checkpoint stores in place of the weights; the loader
            fills them and calls `unpack`.
        loads, place: where choices are counted, and the number of this layer there; None where nobody counts.
    """

    loads: ExpertLoads | None = None
    place: int

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
        self.packed: dict[str, tuple[tuple[int, ...], ParameterSpec]] = {}
        self.gate_up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if e.sigmoid:
            self.correction = build.replicated(f"{name}.{names.router}.e_score_correction_bias", e.count,
                                               dtype=torch.float32)
        in_four_bits = names.parts is None and (c.quantization or {}).get("quant_method") == "mxfp4"
        (self._hold_packed if in_four_bits else self._hold)(
            build, f"{name}.experts", names.parts, e.size, place * self.size, c.hidden_size)
        if e.bias:
            self.router_bias = build.replicated(f"{name}.{names.router}.bias", e.count)
            self._hold_biases(build, f"{name}.experts", e.count, e.size, place * self.size, c.hidden_size)
        self.shared = self.shared_gate = None
        if e.shared_size:
            self.shared = GatedMLP(c, build, f"{name}.{names.shared}", e.shared_size)
        if e.shared_gate:
            self.shared_gate = build.replicated(f"{name}.{names.shared}_gate.weight", 1, c.hidden_size)

    def _hold(self, build: Build, name: str, parts: tuple[str, str, str] | None, whole: int, start: int,
              hidden: int) -> None:
        """Declare the weights, of which a rank has the range of `size` from `start` on of an inner layer of `whole`."""
        size, wide, back = self.size, list[StoredSlice](), list[StoredSlice]()
        for i in range(self.first, self.first + self.count):
            if parts is None:
                all_ = self.config.count
                wide += [StoredSlice(f"{name}.gate_up_proj", (all_, hidden, 2 * whole), 2, size, start, transposed=True,
                                     entry=i, step=2, offset=offset) for offset in (0, 1)]
                back.append(StoredSlice(f"{name}.down_proj", (all_, whole, hidden), 1, size, start, entry=i))
            else:
                gate, up, down = (f"{name}.{i}.{part}.weight" for part in parts)
                wide += [StoredSlice(part, (whole, hidden), 0, size, start) for part in (gate, up)]
                back.append(StoredSlice(down, (hidden, whole), 1, size, start, transposed=True))
        rows = self.count * size
        self.gate_up = build.parameter((2 * rows, hidden), ParameterSpec(0, 0, tuple(wide)))
        self.down = build.parameter((rows, hidden), ParameterSpec(0, 0, tuple(back)))

    def _hold_packed(self, build: Build, name: str, parts: tuple[str, str, str] | None, whole: int, start: int,
                     hidden: int) -> None:
        """As `_hold`, of a checkpoint in MXFP4. The weights are decoded when they are loaded, to the model's dtype."""
        size, mine = self.size, range(self.first, self.first + self.count)
        if size % BLOCK or hidden % BLOCK:
            raise ConfigError("the ranks would cut a block of the experts' MXFP4 weights", got=f"{size} and {hidden}",
                              expected=f"multiples of {BLOCK}", hint="choose another tp or ep")
        for kind, inner in (("blocks", (BLOCK // 2,)), ("scales", ())):
            stored = self.config.count, 2 * whole, hidden // BLOCK, *inner
            wide = [StoredSlice(f"{name}.gate_up_proj_{kind}", stored, 1, size, start, entry=i, step=2, offset=offset)
                    for i in mine for offset in (0, 1)]
            stored = self.config.count, hidden, whole // BLOCK, *inner
            back = [StoredSlice(f"{name}.down_proj_{kind}", stored, 2, size // BLOCK, start // BLOCK, entry=i)
                    for i in mine]
            below = 255 if kind == "scales" else None
            self.packed[f"gate_up_{kind}"] = ((2 * self.count * size, hidden // BLOCK, *inner),
                                              ParameterSpec(None, 0, tuple(wide), below))
            self.packed[f"down_{kind}"] = ((hidden, self.count * size // BLOCK, *inner),
                                           ParameterSpec(None, 1, tuple(back), below))
        self.gate_up = build.parameter((2 * self.count * size, hidden), ParameterSpec(0, 0, ()))
        self.down = build.parameter((self.count * size, hidden), ParameterSpec(0, 0, ()))

    def unpack(self, values: Mapping[str, torch.Tensor]) -> None:
        """Fill the weights from the tensors that `packed` declares."""
        size, dtype = self.size, self.gate_up.dtype
        for i in range(self.count):
            rows = slice(2 * i * size, 2 * (i + 1) * size)
            self.gate_up.data[rows] = decoded(values["gate_up_blocks"][rows], values["gate_up_scales"][rows], dtype)
            part = slice(i * size // BLOCK, (i + 1) * size // BLOCK)
            self.down.data[i * size:(i + 1) * size] = decoded(
                values["down_blocks"][:, part], values["down_scales"][:, part], dtype).t()

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
        x, residual = apply_norm(ops, x, residual, norm, self.eps)
        weights, chosen = ops.route(x, self)
        if self.loads is not None:
            self.loads.add(self.place, chosen)
        y = ops.experts(x, weights, chosen, self)
        if self.shared is not None:
            beside = ops.linear(ops.silu_mul(self.shared.gate_up(x)), self.shared.down)
            if self.shared_gate is not None:
                beside = beside * F.linear(x, self.shared_gate).sigmoid()
            y = y + beside
        return (self.communicator.all_reduce(y) if self.tp > 1 else y), residual
