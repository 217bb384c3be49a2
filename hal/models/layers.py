"""Tensor-parallel layers. Each parameter declares once where its values come from and how `tp` cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from hal.config import Topology
from hal.contracts.communicator import Communicator
from hal.models.ops import Ops


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor, or a range of one, that fills a parameter or a part of it.

    Attributes:
        name: in the checkpoint, without the prefix "model." or "transformer.".
        shape: of the whole checkpoint tensor, as the parameter has it (turned around when `transposed`).
        start, size: the range along the sharded dimension that is meant.
        shards: how many equal parts the range is cut into. Fewer than tp when ranks share one (key-value heads);
            the last part may be short (the vocabulary).
        transposed: stored as [in, out].
    """

    name: str
    shape: tuple[int, ...]
    size: int
    start: int = 0
    shards: int = 1
    transposed: bool = False

    def local(self, topology: Topology) -> tuple[int, int]:
        """The rank's range along the sharded dimension: first and one behind the last."""
        each = -(-self.size // self.shards)
        first = min(topology.tp_rank * self.shards // topology.tp * each, self.size)
        return self.start + first, self.start + min(first + each, self.size)


@dataclass(frozen=True, slots=True)
class Placement:
    """Attributes:
        dim: the parameter's dimension that is sharded over tp; None: every rank holds all of it.
        sources: fill the parameter one after another along `dim`; rows behind the last stay zero.
    """

    dim: int | None
    sources: tuple[Source, ...]


def placement(parameter: nn.Parameter) -> Placement:
    """The declaration of a parameter that a layer below made; a compiler that shards by itself reads `dim`."""
    return cast(Placement, parameter.placement)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer is built with."""

    topology: Topology
    communicator: Communicator
    ops: Ops
    dtype: torch.dtype
    device: torch.device

    def parameter(self, shape: Sequence[int], dim: int | None, *sources: Source) -> nn.Parameter:
        """Uninitialised memory of this rank's `shape`, with its declaration."""
        data = torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
        parameter = nn.Parameter(data, requires_grad=False)
        parameter.placement = Placement(dim, sources)  # type: ignore[attr-defined]
        return parameter

    def vector(self, name: str, size: int) -> nn.Parameter:
        """A replicated vector: a norm's weight or bias."""
        return self.parameter((size,), None, Source(name, (size,), size))


@dataclass(frozen=True, slots=True)
class Output:
    """One checkpoint tensor's share in a column-parallel layer.

    Attributes:
        name: without ".weight". size: its outputs, over all ranks.
        units: how many heads they belong to; a head is never cut.
        start, of: the outputs are the range from `start` of a checkpoint tensor that has `of`; None: all of one.
    """

    name: str
    size: int
    units: int | None = None
    start: int = 0
    of: int | None = None


class Linear(nn.Module):
    """y = x W^T + b. Built by `column` or `row`; `weight` is [out, in] of this rank, or what Ops.pack_linear made."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, build: Build, weight: nn.Parameter, bias: nn.Parameter | None, reduce: bool = False) -> None:
        super().__init__()
        self.ops, self.communicator, self.reduce = build.ops, build.communicator, reduce
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in of this rank] -> [n, out of this rank]; summed over the tp ranks where the layer is row-parallel."""
        y = self.ops.linear(x, self.weight, self.bias)
        return self.communicator.all_reduce(y) if self.reduce else y


def column(build: Build, in_size: int, outputs: Sequence[Output], *, bias: bool, transposed: bool = False) -> Linear:
    """Column-parallel: every rank computes a part of each of `outputs`, side by side, from the whole input."""
    tp = build.topology.tp
    weights, biases = [], []
    rows = 0
    for out in outputs:
        shards = min(tp, out.units or tp)
        whole = out.of or out.size
        weights.append(Source(f"{out.name}.weight", (whole, in_size), out.size, out.start, shards, transposed))
        biases.append(Source(f"{out.name}.bias", (whole,), out.size, out.start, shards))
        rows += out.size // shards
    return Linear(build, build.parameter((rows, in_size), 0, *weights),
                  build.parameter((rows,), 0, *biases) if bias else None)


def row(build: Build, name: str, in_size: int, out_size: int, *, bias: bool, transposed: bool = False) -> Linear:
    """Row-parallel: every rank computes with its part of the input, and the results are summed. The first rank alone
    adds the bias."""
    tp = build.topology.tp
    source = Source(f"{name}.weight", (out_size, in_size), in_size, shards=tp, transposed=transposed)
    adds = bias and build.topology.tp_rank == 0
    return Linear(build, build.parameter((out_size, in_size // tp), 1, source),
                  build.vector(f"{name}.bias", out_size) if adds else None, reduce=tp > 1)


def vocab_weight(build: Build, name: str, vocab_size: int, hidden: int) -> nn.Parameter:
    """[vocab_size / tp rounded up, hidden]: the vocabulary's rows are sharded; the last rank's may end with padding."""
    tp = build.topology.tp
    source = Source(f"{name}.weight", (vocab_size, hidden), vocab_size, shards=tp)
    return build.parameter((-(-vocab_size // tp), hidden), 0, source)


class VocabEmbedding(nn.Module):
    """Rows of a vocabulary that is sharded over tp; a rank contributes zeros for tokens of the others."""

    def __init__(self, build: Build, name: str, vocab_size: int, hidden: int) -> None:
        super().__init__()
        self.communicator, self.tp = build.communicator, build.topology.tp
        self.weight = vocab_weight(build, name, vocab_size, hidden)
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
    """Logits over a vocabulary that is sharded over tp."""

    def __init__(self, build: Build, weight: nn.Parameter, vocab_size: int) -> None:
        super().__init__(build, weight, None)
        self.tp, self.vocab_size = build.topology.tp, vocab_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab_size], complete on every rank (a view where the vocabulary is padded)."""
        logits = super().forward(x)
        return self.communicator.all_gather(logits)[:, :self.vocab_size] if self.tp > 1 else logits
