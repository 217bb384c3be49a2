"""A model that the library does not have: layers with two shapes of paged cache, a layer with a state per row, and a
layer without a cache. Its weights follow from their names, and each tensor-parallel rank takes its part of them."""

from __future__ import annotations

import zlib
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hal.config import Topology, WorkerConfig
from hal.contracts import VERSION
from hal.contracts.attention import AttentionSpec, ForwardContext
from hal.contracts.backend import Backend, Capabilities
from hal.contracts.cache import LayerCache, RowState
from hal.contracts.communicator import Communicator, LocalCommunicator
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig
from hal.paged.runner import PagedModelRunner
from hal.schema import Array
from hal.testing.fake import FakeBackend, FakeRunner

HIDDEN, VOCAB, CHANNELS, TAPS, LENGTH = 32, 97, 16, 3, 40
# The runner reads the number of layers, the vocabulary and the lengths; the rest is as it must be to be legal.
MODEL = ModelConfig(family="llama", architecture="Hybrid", vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=6,
                    num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64, max_position=LENGTH,
                    dtype="float32")
# Heads and key-value heads of all ranks, head size, value size.
NARROW, WIDE = (4, 2, 16, 16), (6, 6, 8, 12)
# Stages of three layers: the first rank has the state alone, the last rank the second shape alone.
KINDS = ("narrow", "none", "state", "wide", "none", "narrow")

Hidden = IntermediateTensors.declare("HybridHidden", hidden=Array("float32", "num_tokens", HIDDEN))


def weight(name: str, rows: int, columns: int, scale: float = 0.25) -> torch.Tensor:
    """[rows, columns], the whole matrix."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(rows, columns, generator=generator) * scale


class Layer(nn.Module):
    """x + f(norm(x)), where the ranks' parts of f are summed. `place` counts the stage's layers of this kind of cache.
    """

    def __init__(self, name: str, kind: str, place: int, topology: Topology, communicator: Communicator,
                 cache: LayerCache, device: torch.device) -> None:
        super().__init__()
        self.name, self.kind, self.place, self.cache = name, kind, place, cache
        self.topology, self.communicator, self.device = topology, communicator, device

    def part(self, name: str, rows: int, columns: int, dim: int = 0) -> torch.Tensor:
        """This rank's part of a matrix that is cut along `dim`."""
        whole = weight(f"{self.name}.{name}", rows, columns)
        return whole.chunk(self.topology.tp, dim)[self.topology.tp_rank].to(self.device)

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        function = {"none": self.mlp, "state": self.recurrence}.get(self.kind, self.attention)
        return x + self.communicator.all_reduce(function(F.rms_norm(x, (HIDDEN,)), context))

    def mlp(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return F.silu(x @ self.part("up", 64, HIDDEN).T) @ self.part("down", HIDDEN, 64, 1).T

    def attention(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        heads, kv_heads, dim, value_dim = NARROW if self.kind == "narrow" else WIDE
        q = (x @ self.part("q", heads * dim, HIDDEN).T).unflatten(1, (-1, dim))
        k = (x @ self.part("k", kv_heads * dim, HIDDEN).T).unflatten(1, (-1, dim))
        v = (x @ self.part("v", kv_heads * value_dim, HIDDEN).T).unflatten(1, (-1, value_dim))
        return context.attention(self.place, q, k, v) @ self.part("o", HIDDEN, heads * value_dim, 1).T

    def recurrence(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """A causal convolution, then h = a * h + (1 - a) * b, each channel by itself (arXiv 2402.19427)."""
        assert context.states is not None
        inputs, gate = x @ self.part("in", CHANNELS, HIDDEN).T, torch.sigmoid(x @ self.part("a", CHANNELS, HIDDEN).T)
        taps = self.part("taps", CHANNELS, TAPS)
        found = context.states.read(self.place)
        starts, out, convs, hs = context.model_input.query_start_loc.tolist(), torch.zeros_like(inputs), [], []
        for seq, (first, end) in enumerate(pairwise(starts)):
            window = torch.cat((found["conv"][seq], inputs[first:end]))  # [TAPS - 1 + n, channels]
            h = found["h"][seq]
            for token in range(end - first):
                value = (window[token:token + TAPS] * taps.T).sum(0)
                h = gate[first + token] * h + (1 - gate[first + token]) * value
                out[first + token] = h
            convs.append(window[len(window) - TAPS + 1:])
            hs.append(h)
        context.states.write(self.place, conv=torch.stack(convs), h=torch.stack(hs))
        return (4 * out) @ self.part("o", HIDDEN, CHANNELS, 1).T


class Hybrid(nn.Module):
    intermediates = ("hidden",)
    intermediate_type = Hidden

    def __init__(self, config: ModelConfig, topology: Topology, communicator: Communicator, device: torch.device,
                 ) -> None:
        super().__init__()
        self.topology, self.device = topology, device
        self.caches = [self.declare(i, topology) for i in range(config.num_layers)]
        stage = topology.layers(config.num_layers)
        self.attention_specs = [c for i in stage if isinstance(c := self.caches[i], AttentionSpec)]
        self.state_specs = [c for i in stage if isinstance(c := self.caches[i], RowState)]
        self.layers = nn.ModuleList()
        places = dict.fromkeys((AttentionSpec, RowState, type(None)), 0)
        for i in stage:
            cache = self.caches[i]
            self.layers.append(Layer(str(i), KINDS[i], places[type(cache)], topology, communicator, cache, device))
            places[type(cache)] += 1

    def declare(self, index: int, topology: Topology) -> LayerCache:
        tp, kind = topology.tp, KINDS[index]
        if kind == "none":
            return None
        if kind == "state":
            return RowState({"h": Array("float32", CHANNELS // tp), "conv": Array("float32", TAPS - 1, CHANNELS // tp)})
        heads, kv_heads, dim, value_dim = NARROW if kind == "narrow" else WIDE
        if kind == "narrow":
            return AttentionSpec(heads // tp, kv_heads // tp, dim, dim ** -0.5, 6, softcap=4.0)
        sinks = weight(f"{index}.sinks", tp, heads // tp, 2.0)[topology.tp_rank].to(self.device)
        return AttentionSpec(heads // tp, kv_heads // tp, dim, dim ** -0.5, value_dim=value_dim, sinks=sinks)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext,
                intermediate: IntermediateTensors | None = None) -> torch.Tensor | IntermediateTensors:
        x = (F.embedding(input_ids, weight("embed", VOCAB, HIDDEN, 1.0).to(self.device)) if intermediate is None else
             intermediate["hidden"])
        for layer in self.layers:
            x = layer(x, context)
        return F.rms_norm(x, (HIDDEN,)) if self.topology.is_last_stage else self.make_intermediate(x)

    def make_intermediate(self, hidden: torch.Tensor) -> IntermediateTensors:
        return Hidden(hidden=hidden)  # type: ignore[call-arg]  # declared at run time

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ weight("head", VOCAB, HIDDEN).T.to(self.device)


class _Plain:
    """Attention within one prompt, written out, and states that begin and are forgotten: no cache of any kind."""

    def __init__(self, model: Hybrid) -> None:
        self.model = model

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec, n = self.model.attention_specs[layer], len(q)
        group = spec.num_heads // spec.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        age = torch.arange(n)[:, None] - torch.arange(n)
        weights = scores.exp() * ((age >= 0) & (age < (spec.window or n)))
        total = weights.sum(-1, keepdim=True) + (0 if spec.sinks is None else spec.sinks.exp()[:, None, None])
        return torch.einsum("hqk,khd->qhd", weights / total, v).flatten(1)

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(1, *(dim.offset for dim in array.dims))
                for name, array in self.model.state_specs[layer].tensors.items()}

    def write(self, layer: int, **values: torch.Tensor) -> None:
        pass


def plain_logits(token_ids: list[int], config: ModelConfig = MODEL) -> torch.Tensor:
    """[tokens, vocab], of the whole sequence in one forward pass."""
    model = Hybrid(config, Topology(), LocalCommunicator(), torch.device("cpu"))
    plain: Any = _Plain(model)
    step: Any = SimpleNamespace(query_start_loc=torch.tensor([0, len(token_ids)]))
    hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), ForwardContext(plain, step, plain))
    return model.compute_logits(hidden)


class HybridRunner(PagedModelRunner):
    def make_model(self, *_: Any) -> Any:
        config = self.config
        return Hybrid(config.model, config.topology, self.communicator, self.device)


class AheadRunner(HybridRunner, FakeRunner):
    """On the fake device, which runs behind the host."""


class HybridBackend(Backend):
    name = "hybrid"
    capabilities = Capabilities(contracts=VERSION, dtypes=("float32",), max_tp=2, max_pp=2)

    def unavailable(self) -> str | None:
        return None

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def free_memory(self, device: torch.device) -> int:
        return 1 << 26

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> HybridRunner:
        return HybridRunner(config, device, communicator)


backend, ahead = HybridBackend(), FakeBackend(AheadRunner)
