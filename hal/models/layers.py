"""Tensor-parallel layers. A layer declares once which tensors it holds and how `tp` shards them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hal.config import Topology
from hal.contracts.communicator import Communicator
from hal.errors import ConfigError
from hal.models.ops import Ops
from hal.weights import LinearSpec, Projection, Scheme, WeightTensor
from hal.weights.dense import BIAS, DENSE
from hal.weights.formats import SchemeOf, mergeable
from hal.weights.sharding import ParameterSpec, StoredSlice, local_outputs, shard


def dense_only(name: str) -> Scheme:
    """The scheme of every projection of a dense checkpoint."""
    return DENSE


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer of a model is built with.

    Attributes:
        dtype, device: of the parameters. schemes: gives the weight scheme of a projection.
        longest: the engine's longest sequence, in tokens; 0: the model's context.
    """

    topology: Topology
    communicator: Communicator
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    schemes: SchemeOf = dense_only
    longest: int = 0

    def parameter(self, shape: Sequence[int], spec: ParameterSpec, dtype: torch.dtype | None = None) -> nn.Parameter:
        """Uninitialised memory of this rank's `shape`, in the model's dtype unless another is given."""
        data = torch.empty(tuple(shape), dtype=dtype or self.dtype, device=self.device)
        parameter = nn.Parameter(data, requires_grad=False)
        parameter.spec = spec  # type: ignore[attr-defined]
        return parameter

    def replicated(self, name: str, *shape: int, dtype: torch.dtype | None = None, added: float = 0.0) -> nn.Parameter:
        """A checkpoint tensor of which every rank holds all, such as a norm's weight or bias. `added`: to each value.
        """
        source = StoredSlice(name, shape, 0, shape[0])
        return self.parameter(shape, ParameterSpec(None, 0, (source,), added=added), dtype)

    def of_heads(self, name: str, heads: int, size: int, dtype: torch.dtype | None = None, added: float = 0.0,
                 ) -> nn.Parameter:
        """A checkpoint vector of `size` entries for each head, of which a rank holds those of its heads."""
        shards = min(self.topology.tp, heads)
        source = StoredSlice(name, (heads * size,), 0, heads * size, shards=shards)
        return self.parameter((heads * size // shards,), ParameterSpec(0, 0, (source,), added=added), dtype)

    def linear_tensor(self, spec: LinearSpec, tensor: WeightTensor, scheme: Scheme) -> nn.Parameter:
        """This rank's part of one tensor of a linear layer. Raises ConfigError where tp cuts a group of its values."""
        dtype = None if tensor.dtype is None else getattr(torch, tensor.dtype)
        shape, declared = shard(spec, tensor, scheme.name, self.topology)
        if scheme.on_load and tensor is not BIAS:
            declared = dataclasses.replace(declared, sources=())  # the checkpoint has no such tensor
        return self.parameter(shape, declared, dtype)

    def head_scheme(self, tied: bool) -> Scheme:
        """The scheme of the head. A head that shares the embedding table is dense, unless `--quantize` makes a copy of
        the table in fewer bits."""
        scheme = self.schemes("lm_head")
        return scheme if scheme.on_load or not tied else DENSE

    def scheme(self, spec: LinearSpec, scheme: Scheme | None = None) -> Scheme:
        """The scheme of a layer; `scheme`: in place of the one that belongs to its name.

        Raises:
            ConfigError: the device's operations cannot multiply by it, or it mixes rows and the operations are
                batch-invariant.
        """
        scheme, can = scheme or self.schemes(spec.name), self.ops.schemes  # projections of a layer have equal schemes
        if can is not None and scheme.name not in can:
            raise ConfigError(f"this device cannot multiply by weights of the scheme {scheme.name!r}", got=spec.name,
                              expected=f"one of the schemes of {type(self.ops).__name__}: {', '.join(can)}",
                              hint="take a checkpoint of dense weights, or another device: the cpu multiplies by "
                                   "every scheme")
        if scheme.mixes_rows and self.ops.batch_invariant:
            raise ConfigError("batch_invariant has no product for inputs that are rounded by one scale of the whole "
                              "step", got=f"{scheme.name!r} of {spec.name}",
                              expected="a scale for each token, or stored scales",
                              hint="run this checkpoint without batch_invariant")
        return scheme


class LinearWeight(nn.Module):
    """What the loader fills: the weight of one linear layer, or the weights of one layer of every expert.

    Attributes:
        scheme: how the weight is stored. Its tensors are attributes of the module under their declared names.
        spec: the sizes over all ranks; of one expert where there are several.
        dense: shapes and declarations of the rank's dense weights, one for each expert, where the scheme's tensors are
            made of them on load. Empty: the checkpoint stores the scheme's tensors.
    """

    scheme: Scheme
    spec: LinearSpec
    dense: tuple[tuple[tuple[int, ...], ParameterSpec], ...] = ()

    def names(self) -> list[str]:
        """The projections' names in the checkpoint."""
        return [projection.name for projection in self.spec.projections]

    def entry(self, name: str, index: int) -> torch.Tensor:
        """The scheme's tensor that is made of the dense weight of this index."""
        return self.get_parameter(name).data


class Linear(LinearWeight):
    """y = x W^T + b. Built by `column` or `row`.

    Attributes:
        outputs: of each projection, on this rank.
        weight: of the dense scheme, [out, in] of this rank, or what Ops.pack_linear made of it.
        reduce: the outputs are summed over the tp ranks. in_size: inputs of this rank.
        packed: what Ops.pack_linear made of the weight, beside the scheme's tensors or in their place, or None.
        dtype: of the inputs and outputs.
        adapters: the layer's slots for adapters (hal.adapters.layers.LayerAdapters); None where the engine has none.
    """

    adapters: Any = None
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, build: Build, spec: LinearSpec, *, bias: bool, weight: nn.Parameter | None = None,
                 scheme: Scheme | None = None) -> None:
        """`weight`: an existing dense weight, which the layer then shares. `scheme`: as of Build.scheme."""
        super().__init__()
        self.ops, self.communicator, self.spec, self.dtype = build.ops, build.communicator, spec, build.dtype
        self.scheme = DENSE if weight is not None else build.scheme(spec, scheme)
        self.is_dense = self.scheme.name == DENSE.name
        self.outputs = local_outputs(spec, build.topology)
        self.reduce = spec.sharded == "in" and build.topology.tp > 1
        ranks = build.topology.axis(spec.mesh_axis).size if spec.sharded == "in" else 1
        self.in_size = -(-spec.in_size // ranks)
        self.packed: Any = None
        if weight is not None:
            self.weight = weight
        else:
            for tensor in self.scheme.tensors(spec):
                self.register_parameter(tensor.name, build.linear_tensor(spec, tensor, self.scheme))
            if self.scheme.on_load:
                self.dense = (shard(spec, DENSE.tensors(spec)[0], DENSE.name, build.topology),)
        self.bias = build.linear_tensor(spec, BIAS, self.scheme) if bias else None

    def stored(self, name: str) -> torch.Tensor:
        """A tensor of the weight, by its declared name. A device may keep it in something else than a parameter."""
        tensor: torch.Tensor = getattr(self, name)
        return tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in of this rank] -> [n, out of this rank]; summed over the tp ranks where the layer is row-parallel."""
        y = self.unsummed(x)
        return self.communicator.all_reduce(y) if self.reduce else y

    def unsummed(self, x: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the sum over the tp ranks."""
        y = self.ops.linear(x, self)
        if self.adapters is not None and self.adapters.step.begun is not None:
            y = self.ops.adapt(y, x, self)
        return y


class Unmerged(nn.Module):
    """The layers of projections whose weights cannot be merged, side by side. It stands for a Linear whose weight is
    not dense."""

    is_dense = reduce = False

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def column(build: Build, in_size: int, projections: Sequence[Projection], *, bias: bool, transposed: bool = False,
           ) -> Linear | Unmerged:
    """A column-parallel layer: every rank computes a part of each projection, side by side, from the whole input."""
    spec = LinearSpec(in_size, tuple(projections), "out", transposed)
    if mergeable(spec, build.schemes):
        return Linear(build, spec, bias=bias)
    return Unmerged([Linear(build, dataclasses.replace(spec, projections=(p,)), bias=bias) for p in projections])


def row(build: Build, name: str, in_size: int, out_size: int, *, bias: bool, transposed: bool = False) -> Linear:
    """A row-parallel layer: every rank computes with its part of the input, and the results are summed. The first rank
    alone adds the bias."""
    spec = LinearSpec(in_size, (Projection(name, out_size),), "in", transposed)
    return Linear(build, spec, bias=bias and build.topology.tp_rank == 0)


class VocabEmbedding(nn.Module):
    """The embedding table, whose rows are sharded over tp. For a token whose row another rank holds, a rank adds zeros
    to the sum."""

    def __init__(self, build: Build, name: str, vocab_size: int, hidden: int) -> None:
        super().__init__()
        self.communicator, self.tp = build.communicator, build.topology.tp
        spec = _vocab(name, vocab_size, hidden)
        self.weight = build.linear_tensor(spec, DENSE.tensors(spec)[0], DENSE)
        self.first = self.weight.shape[0] * build.topology.tp_rank

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[n] int32, each below the vocabulary's size -> [n, hidden], complete on every rank."""
        if self.tp == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.first
        foreign = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return self.communicator.all_reduce(rows.masked_fill_(foreign.unsqueeze(1), 0))


class Head(Linear):
    """The output layer. Its rows, and so the logits that a rank computes, are sharded over tp.

    Args:
        name: of the checkpoint's tensor, without ".weight".
        embedding: the embedding whose weight the head shares where its scheme is dense; None: there is none here.
        tied: the checkpoint stores one table for embedding and head.
    """

    def __init__(self, build: Build, name: str, vocab_size: int, hidden: int, embedding: VocabEmbedding | None,
                 tied: bool) -> None:
        scheme = build.head_scheme(tied)
        shared = None if embedding is None or scheme.on_load else embedding.weight
        super().__init__(build, _vocab(name, vocab_size, hidden), bias=False, weight=shared, scheme=scheme)
        self.tp, self.vocab_size = build.topology.tp, vocab_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> logits [n, vocab_size], complete on every rank. They are a view where the vocabulary is
        padded."""
        logits = super().forward(x)
        return self.communicator.all_gather(logits)[:, :self.vocab_size] if self.tp > 1 else logits


def _vocab(name: str, vocab_size: int, hidden: int) -> LinearSpec:
    """A rank's rows are vocab_size / tp rounded up, so that the last rank's may end with padding."""
    return LinearSpec(hidden, (Projection(name, vocab_size),), "out")
