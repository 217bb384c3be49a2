"""One rank's part of a declared tensor: its shape, and the ranges of checkpoint tensors that fill it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from hal.config import Topology
from hal.errors import ConfigError
from hal.weights.base import Dim, LinearSpec, Projection, WeightTensor

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class StoredSlice:
    """A checkpoint tensor, or a range of one, that fills a parameter or a part of it.

    Attributes:
        name: in the checkpoint, without the prefix "model." or "transformer.".
        shape: of the whole stored tensor.
        dim: the stored tensor's dimension along which the range runs; None: the tensor is read as a whole.
        start, size: the range, in entries of `dim`. Without `dim`, size is the number of entries that the tensor takes
            in the parameter.
        shards: equal parts that the range is cut into, one for each rank. They are fewer than tp where ranks share one
            (key-value heads); the last may be shorter (the vocabulary).
        transposed: the parameter has the two dimensions the other way round.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    size: int
    start: int = 0
    shards: int = 1
    transposed: bool = False

    def local(self, topology: Topology) -> tuple[int, int]:
        """The rank's range along `dim`: the first entry, and the one behind the last."""
        each = -(-self.size // self.shards)
        first = min(topology.tp_rank * self.shards // topology.tp * each, self.size)
        return self.start + first, self.start + min(first + each, self.size)


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """Attributes:
        sharded: the dimension of the parameter that is sharded over `mesh_axis`; None: every rank holds all of it.
        filled: the dimension along which `sources` fill the parameter one after another. Entries behind the last are
            padding, and zero.
        below: as in WeightTensor.
        mesh_axis: the axis of the topology.
    """

    sharded: int | None
    filled: int
    sources: tuple[StoredSlice, ...]
    below: int | None = None
    mesh_axis: str = "tp"


def spec_of(parameter: nn.Parameter) -> ParameterSpec:
    """The declaration that a model's parameter was made with."""
    return cast(ParameterSpec, parameter.spec)  # type: ignore[attr-defined]


def local_outputs(spec: LinearSpec, topology: Topology) -> tuple[int, ...]:
    """Outputs of each projection that a rank computes."""
    return tuple(-(-p.size // (_shards(p, topology) if spec.sharded == "out" else 1)) for p in spec.projections)


def _shards(projection: Projection, topology: Topology) -> int:
    """Of a column-parallel layer."""
    return min(topology.tp, projection.heads or topology.tp)


def shard(spec: LinearSpec, tensor: WeightTensor, scheme: str, topology: Topology,
          ) -> tuple[tuple[int, ...], ParameterSpec]:
    """The shape of a rank's part of a layer's tensor, and its declaration.

    Raises:
        ConfigError: tp, or the merging of projections, cuts outputs or inputs that share an entry of the tensor.
    """
    merged = tensor.merged
    inner = next((i for i, d in enumerate(tensor.dims) if isinstance(d, Dim) and d.axis == "in"), None)
    column = spec.sharded == "out"
    sharded: int | None
    if column:
        sharded = merged if _axis(tensor.dims[merged]) == "out" else None
    else:
        sharded = inner if inner is not None and not cast(Dim, tensor.dims[inner]).replicated else None
    filled = merged if column or sharded is None else sharded
    shape, sources = [0] * len(tensor.dims), []
    for i, p in enumerate(spec.projections):
        shards = 1 if sharded is None else _shards(p, topology) if column else topology.tp
        dim = tensor.dims[filled]
        assert isinstance(dim, Dim)
        units = p.size if filled == merged else spec.in_size
        if dim.axis != "part":
            _check_cuts(spec, p, tensor, dim, scheme, units, shards, i == len(spec.projections) - 1)
        for at, (d, whole) in enumerate(zip(tensor.dims, _whole(spec, p.size, tensor), strict=True)):
            if at == sharded:
                whole = cast(Dim, d).entries(-(-units // shards))
            shape[at] = shape[at] + whole if at == merged else whole
        stored = [(at, n) for at, n in enumerate(_whole(spec, p.of or p.size, tensor)) if
                  _axis(tensor.dims[at]) != "part"]
        along = None if dim.axis == "part" else [at for at, _ in stored].index(filled)
        sizes = tuple(n for _, n in stored)
        if tensor.transposed:
            sizes, along = sizes[::-1], None if along is None else 1 - along
        start = dim.entries(p.start) if dim.axis == "out" else 0
        size = 1 if along is None else dim.entries(units)
        sources.append(StoredSlice(f"{p.name}.{tensor.name}", sizes, along, size, start, shards, tensor.transposed))
    return tuple(shape), ParameterSpec(sharded, filled, tuple(sources), tensor.below)


def _axis(dim: Dim | int) -> str | None:
    return dim.axis if isinstance(dim, Dim) else None


def _whole(spec: LinearSpec, outputs: int, tensor: WeightTensor) -> list[int]:
    """The shape of the tensor of one projection, over all ranks."""
    units = {"out": outputs, "in": spec.in_size, "part": 1}
    return [d.entries(units[d.axis]) if isinstance(d, Dim) else d for d in tensor.dims]


def _check_cuts(spec: LinearSpec, projection: Projection, tensor: WeightTensor, dim: Dim, scheme: str, units: int,
                shards: int, last: bool) -> None:
    """Outputs or inputs that share an entry stay together: they belong to one rank and to one projection."""
    each, what = -(-units // shards), "outputs" if dim.axis == "out" else "inputs"
    if shards > 1 and each % dim.per:
        legal = max(n for n in range(1, shards) if units % n == 0 and (n == 1 or units // n % dim.per == 0))
        raise ConfigError(f"tp={shards} cuts a group of the weight scheme {scheme!r}",
                          got=f"{each} {what} of {projection.name} for each rank",
                          expected=f"a multiple of {dim.per}, since so many {what} share an entry of {tensor.name!r}",
                          hint=f"choose another tp; for this layer the largest below is {legal}")
    if dim.axis == "out" and (projection.start % dim.per or (not last and units % dim.per)):
        raise ConfigError(f"merging the projections of a layer cuts a group of the weight scheme {scheme!r}",
                          got=f"{units} outputs of {projection.name}, from output {projection.start} on",
                          expected=f"multiples of {dim.per}, since so many outputs share an entry of {tensor.name!r}",
                          hint="take a checkpoint with smaller groups, or a dense one")
