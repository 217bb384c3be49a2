"""Tensor parallelism in one process: the shares of all ranks lie side by side, and the compiler shards them over the
mesh.

The models' own tensor-parallel code runs once. A parameter that ranks would share has the shares of all ranks in a new
first dimension, which is annotated as sharded. Between a column-parallel layer and the row-parallel layer after it, the
first dimension of activations has the tokens of one share after another. Where ranks would reduce, the shares are
summed; the compiler (GSPMD, arXiv 2105.04663) makes an all-reduce of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from hal.checkpoints.loader import check_weights, load_weights, random_weights
from hal.config import EngineConfig, Topology
from hal.contracts.communicator import AxisName, LocalCommunicator
from hal.contracts.runner import Progress
from hal.errors import BackendError, ConfigError, InputError
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.delta_rule import Spans, find_spans
from hal.models.layers import Linear
from hal.models.ops import Ops
from hal.weights.dense import DENSE
from hal.weights.sharding import spec_of
from runners.tpu import lowering
from runners.tpu.attention import TILE


class TpuOps(Ops):
    """Linear layers over `ranks` shares. x of a column-parallel layer is [n, in], of a row-parallel one [R * n, in].
    Weights are [in, out]: the other way round XLA's CPU client multiplies 17 times slower, and a TPU does not care."""

    traced = True

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        # A scheme's own arithmetic knows the tensors of one rank, not those of all ranks side by side.
        self.schemes = None if ranks == 1 else (DENSE.name,)

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if not layer.is_dense:
            return super().linear(x, layer)
        weight, bias = layer.weight, layer.bias
        if self.ranks == 1:
            y = x @ weight
            return y if bias is None else y + bias
        if layer.reduce:
            y = torch.einsum("rni,rio->rno", x.view(self.ranks, -1, x.shape[-1]), weight)
        else:
            y = torch.einsum("ni,rio->rno", x, weight)
        if bias is not None:
            y = y + bias[:, None]
        return y.reshape(-1, y.shape[-1])

    def adapt(self, y: torch.Tensor, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """As the base's. With several shares, A of a row-parallel layer and B of a column-parallel one are in shares
        too: [R, slots, ...]."""
        if self.ranks == 1:
            return super().adapt(y, x, layer)
        held, inputs = layer.adapters, x.view(self.ranks if layer.reduce else 1, -1, x.shape[-1])
        a, b = (w if w.ndim == 4 else w[None] for w in (held.a, held.b))
        inner = torch.einsum("rni,rsci->rnsc", inputs.expand(len(a), -1, -1), a)
        inner = inner.view(*inner.shape[:3], -1, held.rank).masked_fill(~held.step.begun, 0)
        inner, b = (w.expand(self.ranks, *w.shape[1:]) for w in (inner, b))
        parts = [torch.einsum("rnsk,rsok->rno", inner[..., i, :], w)
                 for i, w in enumerate(torch.split(b, list(held.outputs), 2))]
        return y + torch.cat(parts, -1).reshape(y.shape)

    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        begun = super().begin_rotary(positions, table, dtype)
        return begun if self.ranks == 1 else tuple(x.repeat(self.ranks, 1, 1) for x in begun)


    def begin_delta(self, m: Any, taps: int) -> Spans | None:
        """With static shapes: all sequences of a mixed step are computed in chunks, one after another."""
        tokens, seqs = len(m.positions), len(m.seq_lens)
        if m.max_query_len == 1:
            return None
        return find_spans(m.query_start_loc, tokens, taps, 0, TILE, tokens // TILE + seqs)


class MeshCommunicator(LocalCommunicator):
    """A Communicator whose collectives are arithmetic over the shares of the tensor-parallel ranks."""

    def __init__(self, topology: Topology, mesh: Any) -> None:
        self.topology, self.mesh = topology, mesh

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        """[R * n, size] -> [n, size], the same on every device."""
        if self._is_alone(axis):
            return super().all_reduce(x, axis)
        return lowering.shard(self._shares(x, axis).sum(0), self.mesh, None)

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        """[R * n, ...] -> [n, ...] with the shares side by side along `dim`, the same on every device."""
        if self._is_alone(axis):
            return super().all_gather(x, axis, dim)
        # One permutation of the sharded dimension is one all-gather; a concatenation would be a sum for each share.
        at = dim % x.ndim
        return lowering.shard(self._shares(x, axis).movedim(0, at).flatten(at, at + 1), self.mesh, None)

    def reduce_scatter(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        """[R * n, ...] -> the parts of the sum along `dim`, one share after another."""
        if self._is_alone(axis):
            return super().reduce_scatter(x, axis, dim)
        total = self._shares(x, axis).sum(0)
        return lowering.shard(torch.cat(total.chunk(self.topology.tp, dim)), self.mesh, 0)

    def all_to_all(self, x: torch.Tensor, axis: AxisName = "tp", send_sizes: Sequence[int] | None = None,
                   recv_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """[R * n, ...] -> the same, where the i-th part of share j has become the j-th part of share i. A program has
        one shape for all shares, so their parts are equal."""
        if send_sizes is not None or recv_sizes is not None:
            raise InputError("a compiled program cuts all shares alike", got="send_sizes or recv_sizes",
                             expected="neither", fields=("send_sizes", "recv_sizes"),
                             hint="pad the rows for each rank to one number")
        if self._is_alone(axis):
            return super().all_to_all(x, axis)
        ranks, shares = self.topology.tp, self._shares(x, axis)
        parts = shares.view(ranks, ranks, -1, *x.shape[1:])
        return lowering.shard(parts.transpose(0, 1).reshape(x.shape), self.mesh, 0)

    def broadcast(self, x: torch.Tensor, axis: AxisName = "tp", source: int = 0) -> torch.Tensor:
        """[R * n, ...] -> [n, ...]: that share, the same on every device."""
        if self._is_alone(axis):
            return super().broadcast(x, axis, source)
        return lowering.shard(self._shares(x, axis)[source], self.mesh, None)

    def _is_alone(self, axis: str) -> bool:
        """Whether the axis has one rank. Every share is then complete, and a collective changes nothing."""
        return self.topology.axis(axis).size == 1

    def _shares(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """[R, n, ...]. Raises BackendError: the axis is not that of the shares."""
        if self.topology.axis(axis).ranks != self.topology.axis("tp").ranks:
            raise BackendError("the shares of one process are those of the tensor-parallel ranks", got=f"axis={axis!r}",
                               expected="the axis 'tp', or 'ep' with ep=tp")
        return x.view(self.topology.tp, -1, *x.shape[1:])


class Embedding(nn.Module):
    """Embedding of tokens. If there are several shares, each finds its own rows, and the shares are summed.

    Args:
        weight: [vocab, hidden], or in shares [R, vocab / R, hidden]. columns: the last two are swapped, as the head
            wants a weight that it shares.
    """

    def __init__(self, weight: torch.Tensor, columns: bool, communicator: LocalCommunicator) -> None:
        super().__init__()
        self.weight, self.columns, self.communicator = weight, columns, communicator

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.weight.ndim == 2:
            rows = self.weight.index_select(int(self.columns), input_ids)
            return rows.t().contiguous() if self.columns else rows
        ranks, vocab = self.weight.shape[0], 2 if self.columns else 1
        share, hidden = self.weight.shape[vocab], self.weight.shape[3 - vocab]
        local = input_ids[None] - torch.arange(ranks, dtype=torch.int32, device=input_ids.device)[:, None] * share
        foreign = (local < 0) | (local >= share)
        index = local.masked_fill(foreign, 0).long().unsqueeze(3 - vocab)
        rows = self.weight.gather(vocab, index.expand(-1, *((hidden, -1) if self.columns else (-1, hidden))))
        rows = rows.transpose(1, 2) if self.columns else rows
        return self.communicator.all_reduce(rows.masked_fill(foreign[:, :, None], 0).reshape(-1, hidden))


def load(engine: EngineConfig, config: ModelConfig, pp_rank: int, dtype: torch.dtype, mesh: Any,
         progress: Progress) -> CausalLM:
    """The stage's model on the device, with the shares of all tensor-parallel ranks. Raises as load_weights does."""
    if engine.tp > 1 and config.qk_norm_whole:
        raise ConfigError("backend 'tpu' does not shard a norm over the whole of q and k", got=f"tp={engine.tp}",
                          expected="tp=1", hint=f"run {config.architecture} with tp=1, or on another device")
    if engine.tp > 1 and config.experts is not None:
        raise ConfigError("backend 'tpu' does not shard experts", got=f"tp={engine.tp}", expected="tp=1",
                          hint=f"run {config.architecture} with tp=1, or on another device")
    if engine.tp > 1 and config.delta is not None:
        raise ConfigError("backend 'tpu' does not shard states of rows", got=f"tp={engine.tp}", expected="tp=1",
                          hint=f"run {config.architecture} with tp=1, or on another device")
    mesh_ranks = Topology(engine.tp, engine.pp, ep=engine.ep).every_rank()
    topologies = [topology for topology in mesh_ranks if topology.pp_rank == pp_rank]
    communicator = MeshCommunicator(topologies[0], mesh) if engine.tp > 1 else LocalCommunicator()
    ops, shares = TpuOps(engine.tp), []
    checked = None if engine.random_weights else check_weights(config, engine.model)
    for topology in topologies:
        share = build_model(config, topology, communicator, ops, dtype, torch.device("cpu"),
                            engine.longest_sequence(config))
        if engine.random_weights:
            random_weights(share, engine.seed)
        else:
            load_weights(share, engine.model, progress, checked=checked)
        shares.append(share)
    return _place(shares, communicator, mesh)


def _place(shares: Sequence[CausalLM], communicator: LocalCommunicator, mesh: Any) -> CausalLM:
    """The model of the first share, with its parameters replaced by those of all shares, on the device."""
    model, moved = shares[0], dict[tuple[nn.Parameter, bool], torch.Tensor]()
    multiplied = {m.weight for m in model.modules() if isinstance(m, Linear) and m.is_dense}
    modules = [dict(share.named_modules()) for share in shares]
    for name, module in list(model.named_modules()):
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, lowering.place(buffer, mesh, None))
        for key, parameter in list(module.named_parameters(recurse=False)):
            # An embedding of transformers reads rows, so where the head shares its table there are two of them.
            turned = parameter in multiplied and not isinstance(module, nn.Embedding)
            if (parameter, turned) not in moved:
                moved[parameter, turned] = _together([found[name] for found in modules], key, turned, mesh)
            del module._parameters[key]
            setattr(module, key, moved[parameter, turned])
    for spec in model.attention_specs:
        if spec.sinks is not None:
            object.__setattr__(spec, "sinks", moved[cast(nn.Parameter, spec.sinks), False])
    if hasattr(model, "embed"):
        tied = hasattr(model, "head") and getattr(model.head, "weight", None) is model.embed.weight
        model.embed = Embedding(model.embed.weight, tied, communicator)  # type: ignore[assignment]
    return model


def _together(modules: Sequence[nn.Module], key: str, turned: bool, mesh: Any) -> torch.Tensor:
    """A parameter on the device: unchanged if all ranks hold the same, else with their parts in a new first dimension.
    """
    first = modules[0].get_parameter(key)
    reduces = isinstance(modules[0], Linear) and modules[0].reduce
    # Of a bias that is added to a sum the first rank alone has any.
    parts = [torch.zeros_like(first) if p is None else p.data for p in (getattr(m, key) for m in modules)]
    if turned:
        parts = [part.t().contiguous() for part in parts]
    if len(modules) == 1 or (spec_of(first).sharded is None and not reduces):
        return lowering.place(parts[0], mesh, None)
    return lowering.place(torch.stack(parts), mesh, 0)
