"""One rank's part of a declared tensor: its shape, and the ranges of checkpoint tensors that fill it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from hal.config import Axis, Topology
from hal.errors import ConfigError
from hal.weights.base import Dim, LinearSpec, Projection, WeightTensor

if TYPE_CHECKING:
    import torch
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
        entry: only this entry of the stored tensor's first dimension is read, without that dimension.
        step, offset: the range is of every `step`-th entry of `dim` from `offset` on; `start` and `size` count these.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    size: int
    start: int = 0
    shards: int = 1
    transposed: bool = False
    entry: int | None = None
    step: int = 1
    offset: int = 0

    def index(self, first: int, last: int) -> tuple[slice, ...]:
        """What to read of the stored tensor for the range from `first` to `last`; `picked` takes the rest from it."""
        if self.dim is None:
            return ()
        along = [slice(None)] * self.dim + [slice(first * self.step, last * self.step)]
        return tuple(along if self.entry is None else [slice(self.entry, self.entry + 1), *along[1:]])

    def picked(self, value: torch.Tensor) -> torch.Tensor:
        """The range, out of what `index` reads."""
        if self.step > 1 and self.dim is not None:
            value = value[(*[slice(None)] * self.dim, slice(self.offset, None, self.step))]
        value = value if self.entry is None else value[0]
        return value.t() if self.transposed else value

    def local(self, axis: Axis) -> tuple[int, int]:
        """The rank's range along `dim`: the first entry, and the one behind the last. `axis` is the mesh axis that the
        parameter is sharded over."""
        each = -(-self.size // self.shards)
        first = min(axis.rank * self.shards // axis.size * each, self.size)
        return self.start + first, self.start + min(first + each, self.size)


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """Attributes:
        sharded: the dimension of the parameter that is sharded over `mesh_axis`; None: every rank holds all of it.
        filled: the dimension along which `sources` fill the parameter one after another. Entries behind the last are
            padding, and zero.
        below: as in WeightTensor.
        mesh_axis: of the topology.
        added: to every stored value, in the parameter's dtype.
        each: of a parameter that holds one tensor for each expert along its first dimension, the declarations of these
            tensors. The parameter itself then has no sources.
    """

    sharded: int | None
    filled: int
    sources: tuple[StoredSlice, ...]
    below: int | None = None
    mesh_axis: str = "tp"
    added: float = 0.0
    each: tuple[ParameterSpec, ...] = ()


def spec_of(parameter: nn.Parameter) -> ParameterSpec:
    """The declaration that a model's parameter was made with."""
    return cast(ParameterSpec, parameter.spec)  # type: ignore[attr-defined]


def pieces(parameter: nn.Parameter) -> list[tuple[torch.Tensor, ParameterSpec]]:
    """The tensors that a checkpoint fills, which are views of the parameter, with their declarations."""
    spec = spec_of(parameter)
    return list(zip(parameter.data, spec.each, strict=True)) if spec.each else [(parameter.data, spec)]


def local_outputs(spec: LinearSpec, topology: Topology) -> tuple[int, ...]:
    """Outputs of each projection that a rank computes."""
    size = topology.axis(spec.mesh_axis).size if spec.sharded == "out" else 1
    return tuple(-(-p.size // _shards(p, size)) for p in spec.projections)


def shard(spec: LinearSpec, tensor: WeightTensor, scheme: str, topology: Topology, groups: int = 1,
          ) -> tuple[tuple[int, ...], ParameterSpec]:
    """The shape of a rank's part of a layer's tensor, and its declaration. `groups`, for messages: so many times the
    ranks of `topology` are those of the engine's tp.

    Raises:
        ConfigError: a boundary of ranks or of merged projections cuts outputs or inputs that share an entry.
    """
    merged, outer = tensor.merged
    inner = tensor.inner
    sharded: int | None = None
    if spec.sharded == "out":
        sharded = merged if outer.axis == "out" else None
    elif inner is not None and not inner[1].replicated:
        sharded = inner[0]
    filled = merged if sharded is None else sharded
    ranks = topology.axis(spec.mesh_axis).size
    whole = [d if isinstance(d, int) else d.entries(spec.in_size) for d in tensor.dims]  # but for the merged dimension
    shape, rows, sources = whole.copy(), 0, []
    for p in spec.projections:
        shards = 1 if sharded is None else _shards(p, ranks) if sharded == merged else ranks
        whole[merged] = outer.entries(p.of or p.size)
        if filled == merged:
            _check_cuts(p, tensor, outer, scheme, p.size, shards, p is spec.projections[-1], groups)
            start, size = outer.entries(p.start) if p.start else 0, outer.entries(p.size)
        else:
            assert inner is not None
            _check_cuts(p, tensor, inner[1], scheme, spec.in_size, shards, True, groups)
            start, size = 0, whole[filled]
            shape[filled] = inner[1].entries(-(-spec.in_size // shards))
        rows += outer.entries(-(-p.size // shards) if filled == merged else p.size)
        stored, along = tuple(whole), filled
        if outer.axis == "part":
            stored, along = stored[:merged] + stored[merged + 1:], filled - (filled > merged)
        if tensor.transposed:
            stored, along = stored[::-1], 1 - along
        read = None if filled == merged and outer.axis == "part" else along
        sources.append(StoredSlice(f"{p.name}.{tensor.name}", stored, read, size, start, shards, tensor.transposed))
    shape[merged] = rows
    return tuple(shape), ParameterSpec(sharded, filled, tuple(sources), tensor.below, spec.mesh_axis)


def _shards(projection: Projection, ranks: int) -> int:
    """Of a column-parallel layer: ranks share heads that are fewer than they."""
    return min(ranks, projection.heads or ranks)


def _check_cuts(projection: Projection, tensor: WeightTensor, dim: Dim, scheme: str, units: int, shards: int,
                last: bool, groups: int) -> None:
    """Outputs or inputs that share an entry stay together: they belong to one rank and to one projection."""
    if dim.per == 1:
        return
    each, what = -(-units // shards), "outputs" if dim.axis == "out" else "inputs"
    if shards > 1 and each % dim.per:
        legal = max(n for n in range(1, shards) if units % n == 0 and (n == 1 or units // n % dim.per == 0))
        raise ConfigError(f"tp={shards * groups} cuts a group of the weight scheme {scheme!r}",
                          got=f"{each} {what} of {projection.name} for each rank",
                          expected=f"a multiple of {dim.per}, since so many {what} share an entry of {tensor.name!r}",
                          hint=f"choose another tp; for this layer the largest below is {legal * groups}")
    if dim.axis == "out" and (projection.start % dim.per or (not last and units % dim.per)):
        raise ConfigError(f"merging the projections of a layer cuts a group of the weight scheme {scheme!r}",
                          got=f"{units} outputs of {projection.name}, from output {projection.start} on",
                          expected=f"multiples of {dim.per}, since so many outputs share an entry of {tensor.name!r}",
                          hint="take a checkpoint with smaller groups, or a dense one")
