"""Weights of experts in fewer bits than the model's dtype, as the checkpoint stores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from hal.config import Topology
from hal.models.layers import Build, Linear, LinearWeight
from hal.weights import LinearSpec
from hal.weights.dense import DENSE
from hal.weights.sharding import ParameterSpec, StoredSlice, local_outputs, shard

_VALUES = 1 << 26  # of weights and of what experts compute with them, which exist at once


@dataclass(frozen=True, slots=True)
class Storage:
    """Where a checkpoint has the tensors of experts.

    Attributes:
        name: of a layer's experts. count: of all of them.
        parts: as of ExpertNames.
    """

    name: str
    parts: tuple[str, str, str] | None
    count: int

    def projection(self, expert: int, place: int) -> str:
        """The name of an expert's gate (0), up (1) or down (2), for its scheme and for messages."""
        if self.parts is None:
            return f"{self.name}.{'down' if place == 2 else 'gate_up'}_proj"
        return f"{self.name}.{expert}.{self.parts[place]}"

    def locate(self, source: StoredSlice, place: int, expert: int) -> StoredSlice:
        """The source of a tensor of one expert's gate (0), up (1) or down (2), with the tensor's own name, as if the
        expert were stored by itself, to where the checkpoint has it."""
        name, shape, dim, turned = self.projection(expert, place), source.shape, source.dim or 0, source.transposed
        if self.parts is not None:
            return dataclasses.replace(source, name=f"{name}.{source.name}")
        if place < 2:  # gate and up in turns
            shape = 2 * shape[0], *shape[1:]
        if source.name == "weight":  # a dense one is stored as [in, out]
            shape, dim, turned = shape[::-1], 1 - dim, not turned
        else:
            name = f"{name}_{source.name}"
        step, offset = (2, place) if place < 2 else (1, 0)
        return dataclasses.replace(source, name=name, shape=(self.count, *shape), dim=dim + 1, entry=expert,
                                   transposed=turned, step=step, offset=offset)


class ExpertWeight(LinearWeight):
    """One linear layer of every expert of a rank. The parameters have the names that the scheme declares, and in front
    of the declared dimensions one that counts the experts.

    Args:
        spec: of one expert. place: of the spec's first projection, as of Storage.
        experts: those of this rank. cut: the ranks that share an expert, and this rank's place among them.

    Attributes:
        outputs, in_size: as Linear's, of one expert. packed: what the device made of each expert's weight, or empty.
    """

    def __init__(self, build: Build, spec: LinearSpec, stored: Storage, place: int, experts: range, cut: Topology,
                 ) -> None:
        super().__init__()
        self.scheme, self.spec, self.dtype = build.scheme(spec), spec, build.dtype
        self.stored, self.place, self.experts = stored, place, experts
        self.outputs = local_outputs(spec, cut)
        self.in_size = -(-spec.in_size // (cut.tp if spec.sharded == "in" else 1))
        self.packed: Sequence[Any] = ()
        groups = build.topology.ep

        def declared(name: str, one: ParameterSpec) -> tuple[ParameterSpec, ...]:
            sources = []
            for source in one.sources:
                first, last = source.local(cut.axis("tp"))  # the axis of the mesh has ranks of other experts too
                sources.append(dataclasses.replace(source, name=name, start=first, size=last - first, shards=1))
            return tuple(dataclasses.replace(one, sources=tuple(
                stored.locate(source, place + i, expert) for i, source in enumerate(sources))) for expert in experts)

        for tensor in self.scheme.tensors(spec):
            shape, one = shard(spec, tensor, self.scheme.name, cut, groups)
            each = () if self.scheme.on_load else declared(tensor.name, one)  # else the checkpoint has no such tensor
            dtype = None if tensor.dtype is None else getattr(torch, tensor.dtype)
            self.register_parameter(tensor.name, build.parameter(
                (len(experts), *shape), ParameterSpec(None, 0, (), one.below, each=each), dtype))
        if self.scheme.on_load:
            shape, one = shard(spec, DENSE.tensors(spec)[0], DENSE.name, cut, groups)
            self.dense = tuple((shape, each) for each in declared("weight", one))

    def names(self) -> list[str]:
        return [self.stored.projection(expert, self.place + i) for expert in self.experts
                for i in range(len(self.spec.projections))]

    def entry(self, name: str, index: int) -> torch.Tensor:
        return self.get_parameter(name).data[index]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the scheme, by name, of all experts. A device may keep them in something else than parameters."""
        return {tensor.name: getattr(self, tensor.name) for tensor in self.scheme.tensors(self.spec)}

    def decoded(self, index: int) -> torch.Tensor:
        """The dense weight of one expert, [out, in] in the model's dtype."""
        return self.scheme.dequantize(self.expert(index, None)).detach()

    def release(self) -> None:
        """Free the memory of the tensors, which the device has arranged anew."""
        for name in self.tensors():
            delattr(self, name)

    def expert(self, index: int, bias: torch.Tensor | None) -> Linear:
        """The layer of one expert, for Ops.linear. bias: of all experts, [count, out]."""
        tensors = {} if self.packed else {name: tensor[index] for name, tensor in self.tensors().items()}
        packed = self.packed[index] if self.packed else None
        return cast(Linear, OneExpert(self, tensors, None if bias is None else bias[index], packed))


class OneExpert:
    """Has what schemes and operations read of a Linear. The tensors are views."""

    is_dense, adapters = False, None

    def __init__(self, of: ExpertWeight, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None,
                 packed: Any = None) -> None:
        self.scheme, self.spec, self.dtype, self.outputs, self.in_size = (
            of.scheme, of.spec, of.dtype, of.outputs, of.in_size)
        self.tensors, self.bias, self.packed = tensors, bias, packed

    @property
    def weight(self) -> torch.Tensor:
        return self.tensors["weight"]

    def stored(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def every_expert(x: torch.Tensor, share: torch.Tensor, layers: Sequence[ExpertWeight],
                 biases: Sequence[torch.Tensor | None], gated: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The sum over the experts of this rank of what each makes of every token -> fp32 [n, hidden]. Some experts at a
    time are dequantised.

    Args:
        share: fp32 [count, n, 1], how much of an expert's output a token gets.
        layers: the experts' first layers, whose outputs lie side by side, and then the last one. biases: of them.
        gated: the activation between them.
    """
    held, given = [w.tensors() for w in layers], [b for b in biases if b is not None]

    def compute(share: torch.Tensor, tensors: list[dict[str, torch.Tensor]], given: list[torch.Tensor]) -> torch.Tensor:
        left = iter(given)
        *first, last = (cast(Linear, OneExpert(w, t, None if b is None else next(left)))
                        for w, t, b in zip(layers, tensors, biases, strict=True))
        inner = gated(torch.cat([w.scheme.linear(x, w) for w in first], -1))
        return last.scheme.linear(inner, last).float() * share

    values = sum(sum(w.outputs) * (w.in_size + len(x)) for w in layers)  # of an expert, with its inner results
    step, total = max(_VALUES // values, 1), x.new_zeros(x.shape, dtype=torch.float32)
    for at in range(0, len(share), step):
        part = slice(at, at + step)
        some = [{name: tensor[part] for name, tensor in tensors.items()} for tensors in held]
        total = total + torch.vmap(compute)(share[part], some, [b[part] for b in given]).sum(0)
    return total
