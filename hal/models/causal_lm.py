"""The base of all models: embeddings on the first stage, the head on the last, and the tensors between stages."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from hal.contracts.attention import AttentionSpec, ForwardContext
from hal.contracts.cache import LayerCache, RowState
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig
from hal.models.attention import SelfAttention, local_heads
from hal.models.experts import Experts
from hal.models.latent import LatentAttention
from hal.models.layers import Build, Head, Linear, VocabEmbedding
from hal.schema import Array


class CausalLM(nn.Module, abc.ABC):
    """One rank's part of a model. A model that makes embeddings has no head. The memory is uninitialised until
    `hal.checkpoints.loader` fills it.

    Attributes:
        caches: of all layers of the model, on this rank.
        attention_specs, state_specs: of this stage's layers that have such a cache, in order.
        places: of each of this stage's layers, its number among those with the same kind of cache.
        selects_rows: the model takes ForwardContext.rows.
        intermediate_type: the class of the tensors that a stage passes to the next. Its fields are `intermediates`.
    """

    selects_rows = False
    intermediates: tuple[str, ...]  # names of the tensors between stages, each [num_tokens, hidden_size]
    # Names of stored tensors that may be there without effect; with a dot at the end, how such names begin.
    ignored: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.begin(config, build)
        topology = build.topology
        if topology.is_first_stage and (config.eagle is None or config.eagle.own_embeddings):
            self.embed = VocabEmbedding(build, config.embedding_name, config.vocab_size, config.hidden_size)
        if config.embedding is not None:
            self.ignored = (*self.ignored, "lm_head.weight")
        elif topology.is_last_stage:
            shared = self.embed if config.tie_embeddings and topology.is_first_stage else None
            name = config.embedding_name if config.tie_embeddings else "lm_head"
            rows = config.vocab_size if config.eagle is None else config.eagle.draft_vocab_size
            self.head = Head(build, name, rows, config.hidden_size, shared, config.tie_embeddings)

    def begin(self, config: ModelConfig, build: Build) -> None:
        """Set the attributes of every decoder, before its layers are made."""
        topology = build.topology
        self.config, self.topology, self.ops, self.dtype = config, topology, build.ops, build.dtype
        self.stage = topology.layers(config.num_layers)
        self.caches = self.declare_caches(build)
        here = [self.caches[i] for i in self.stage]
        self.attention_specs = [cache for cache in here if isinstance(cache, AttentionSpec)]
        self.state_specs = [cache for cache in here if isinstance(cache, RowState)]
        kinds = [type(cache) for cache in here]
        self.places = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        name = str(build.dtype).removeprefix("torch.")
        self.intermediate_type: type[IntermediateTensors] = IntermediateTensors.declare(
            f"{type(self).__name__}Intermediate",
            **{n: Array(name, "num_tokens", config.hidden_size) for n in self.intermediates})

    def declare_caches(self, build: Build) -> list[LayerCache]:
        """The cache of each layer of the whole model, since the ranks of every stage prepare the same input. It is
        called before the layers are made. By default every layer has the configuration's attention, and only the
        windows differ. Sinks are parameters of this stage's layers."""
        c = self.config
        heads, kv_heads = local_heads(c, self.topology.tp)
        here = self.stage if c.sinks else ()
        self.sink_scores = nn.ParameterDict({str(i): build.of_heads(f"layers.{i}.self_attn.sinks", c.num_heads, 1)
                                       for i in here})
        return [AttentionSpec(heads, kv_heads, c.head_dim, c.attention_scale or c.head_dim ** -0.5, window,
                              softcap=c.attention_softcap, sinks=self.sink_scores[str(i)] if i in here else None)
                for i, window in enumerate(c.windows or (None,) * c.num_layers)]

    @abc.abstractmethod
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext,
                intermediate: IntermediateTensors | None = None) -> torch.Tensor | IntermediateTensors:
        """One step of this stage.

        Args:
            input_ids: [num_tokens] int32; only the first stage reads them.
            positions: [num_tokens] int32, below max_position.
            context: of the step.
            intermediate: the result of the previous stage; None on the first stage.

        Returns:
            On the last stage, the hidden states [num_tokens, hidden_size] after the final norm; on every other stage,
            an `intermediate_type`.
        """

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size] in the model's dtype, complete on every tp rank. Only the last stage has
        logits."""
        logits: torch.Tensor = self.head(hidden)
        if (cap := self.config.logits_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def make_intermediate(self, *tensors: torch.Tensor) -> IntermediateTensors:
        """The output of a stage before the last one. `tensors` are in the order of `intermediates`."""
        make: Callable[..., IntermediateTensors] = self.intermediate_type
        return make(**dict(zip(self.intermediates, tensors, strict=True)))

    def scale_cache(self) -> None:
        """Use the checkpoint's scales of keys and values, where it has any, from now on. It is called before the
        attention is made. Raises ModelLoadError: a scale is not above 0."""
        factors = [module.scale_cache() for module in self.modules() if isinstance(module, SelfAttention)]
        if any(factor != 1.0 for factor in factors):
            self.attention_specs = [dataclasses.replace(spec, scale=spec.scale * factor)
                                    for spec, factor in zip(self.attention_specs, factors, strict=True)]

    def pack(self) -> None:
        """Let the device rearrange the weights after they are filled (see Ops.pack_linear and pack_experts)."""
        for module in self.modules():
            if isinstance(module, (SelfAttention, LatentAttention)):
                module.arrange()
            if isinstance(module, Linear):
                self.ops.pack_linear(module)
            if isinstance(module, Experts) and module.few_bits:
                self.ops.pack_experts(module)
