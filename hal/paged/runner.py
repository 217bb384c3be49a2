"""The default model runner: plain PyTorch, composed of parts that a device may replace one by one."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from hal.adapters.files import slot_values
from hal.adapters.layers import ModelAdapters
from hal.checkpoints.loader import load_model
from hal.config import WorkerConfig
from hal.contracts.attention import ForwardContext, MakeAttention
from hal.contracts.cache import RowState
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import IntermediateTensors, PagedModelInput, SamplingInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.contracts.runner import ModelRunnerBase, Progress, no_progress
from hal.errors import ConfigError
from hal.models.causal_lm import CausalLM
from hal.models.delta import GatedDelta
from hal.models.experts import ExpertLoads, Experts
from hal.models.layers import Linear
from hal.models.ops import Ops
from hal.paged.attention import PagedAttention
from hal.paged.batch import BatchState, exact_shape
from hal.paged.pending import PendingTokens
from hal.paged.row_states import RowStates
from hal.paged.steps import take_steps
from hal.profiling import span
from hal.sampling.sampler import Sampler, TokenLogprobs, logprobs
from hal.sampling.verification import drafts_behind, verified_tokens, verify
from hal.schema import Packed


class Forwarded(NamedTuple):
    """The result of the last stage's forward pass, from which sampling starts.

    Attributes:
        logits: [num_samples, vocab_size]. hidden: [num_logits, hidden_size] of the tokens in logits_indices, or None
            where no prompt logprobs are asked for.
        token_ids: int32 [num_samples], the most likely tokens, where a graph has found them already.
        taps: [num_tokens, len(taps) * hidden_size], the inputs of the layers that the runner's `taps` name, side by
            side; None where it names none.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    taps: torch.Tensor | None = None


class PagedModelRunner(ModelRunnerBase[PagedModelInput]):
    """A runner for any device that PyTorch runs on. A backend passes parts of its own, or overrides methods.

    Args:
        attention: makes the attention of this rank's layers. ops, sampler: the models' operations, and the sampler.

    Attributes:
        taps: layers whose inputs a proposer reads; it sets them before the model is loaded.
        queries: the numbers of tokens of a sequence, above one, in the steps of a round of speculative decoding,
            ascending: a device may prepare programs for them. A proposer sets those of its draft likewise.
        adapters: the slots of the model's layers; None where the engine has none.
        selects_rows: in a step that has logits of some tokens only, the last layer computes these alone, behind its
            attention. A device that has one program for all values of the indices leaves this off.
    """

    input_type, output_type = PagedModelInput, SamplerOutput
    selects_rows = False
    two_phase = verifies = multi_step = True
    model: CausalLM
    taps: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()
    adapters: ModelAdapters | None = None

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator, *,
                 attention: MakeAttention = PagedAttention, ops: Ops | None = None,
                 sampler: Sampler | None = None) -> None:
        super().__init__(config, device, communicator)
        engine = config.engine
        self.tokens_per_row = max(self.tokens_per_row, engine.max_samples)
        self.make_attention, self.ops, self.sampler = attention, ops or Ops(), sampler or Sampler()
        self.dtype: torch.dtype = getattr(torch, config.model.dtype if engine.dtype == "auto" else engine.dtype)
        # fp8 as bytes: code that moves blocks takes bytes, and the attention knows their meaning.
        self.kv_dtype = torch.uint8 if engine.kv_dtype == "fp8" else self.dtype
        self.state = BatchState(engine.max_num_seqs, config.max_model_len, engine.block_size, config.model.vocab_size,
                                self.input_type,
                                asynchronous=bool(engine.async_scheduling) and self.tokens_per_row == 1)
        self.pending = PendingTokens(engine.max_num_seqs, device, communicator)
        self.queries = verified_tokens(engine.speculative_tokens) if engine.speculate else ()

    def load_model(self, progress: Progress = no_progress) -> None:
        model = self.make_model(progress)
        if self.kv_dtype != self.dtype:
            model.scale_cache()
        self.model = self.transform(model)
        self.intermediate_type = self.model.intermediate_type
        self.attention = self.make_attention(self.model.attention_specs, device=self.device, dtype=self.dtype)
        self.has_row_states = any(isinstance(cache, RowState) for cache in self.model.caches)
        self.state.has_row_states = self.has_row_states
        if self.has_row_states and self.config.engine.batch_invariant:
            raise ConfigError("batch_invariant has no kernels for layers that keep a state of a row",
                              got=self.config.engine.model, expected="a model whose layers have paged caches")
        self.states = RowStates(self.model.state_specs, self.config.engine.max_num_seqs, self.device)
        self.row_states = self.states.tensors
        layers = [module for module in model.modules() if isinstance(module, Experts)]
        self.loads = ExpertLoads(layers) if layers and self.config.engine.expert_loads else None
        if self.config.engine.max_adapters:
            engine = self.config.engine
            self.adapters = ModelAdapters(model, self.ops, engine.max_adapters, engine.max_adapter_rank, self.device)

    def expert_loads(self) -> np.ndarray[Any, Any] | None:
        return None if self.loads is None else self.loads.counts.cpu().numpy().copy()

    def load_adapter(self, slot: int, path: str) -> None:
        assert self.adapters is not None
        for layer, a, b in slot_values(self.model, self.adapters, path):
            layer.adapters.a[slot].copy_(a)
            layer.adapters.b[slot].copy_(b)

    def make_model(self, progress: Progress = no_progress) -> CausalLM:
        """This rank's part of the model, with its weights. Raises as load_model."""
        return load_model(self.config, self.communicator, self.ops, self.dtype, self.device, progress)

    def transform(self, model: CausalLM) -> CausalLM:
        """Compile or rewrite the loaded model. The result is called like the model."""
        return model

    def cache_shapes(self, num_blocks: int) -> list[tuple[int, ...]]:
        """Of each layer of this rank's stage that has a paged cache."""
        return [self.attention.cache_shape(spec, num_blocks, self.config.engine.block_size)
                for spec in self.model.attention_specs]

    def kv_bytes_per_block(self) -> int:
        return sum(map(math.prod, self.cache_shapes(1))) * self.kv_dtype.itemsize

    def reserve_bytes(self) -> int:
        """Activations of a layer over the most tokens, what attention needs (the default one's, if the device has
        another), and logits with the sampler's fp32 copies. An estimate from above."""
        engine, c, specs = self.config.engine, self.config.model, self.model.attention_specs
        tokens, item = max(engine.max_num_batched_tokens, engine.max_num_seqs), self.dtype.itemsize
        qkv = max((s.num_heads * s.head_dim + s.num_kv_heads * (s.head_dim + s.value_dim) for s in specs), default=0)
        layer = tokens * (6 * c.hidden_size + 3 * qkv + 3 * c.intermediate_size // self._tp) * item
        default = self.attention if isinstance(self.attention, PagedAttention) else PagedAttention(
            specs, device=self.device, dtype=self.dtype)
        attention = default.step_bytes(tokens, engine.max_num_seqs, self.config.max_model_len)
        samples = min(engine.max_num_seqs * engine.max_samples, tokens)
        logits = samples * c.vocab_size * (item + 16) if self.config.topology.is_last_stage else 0
        # A weight that is not dense is dequantised by way of fp32.
        dequantized = max((sum(m.outputs) * m.in_size * 12 for m in self.model.modules()
                           if isinstance(m, Linear) and not m.is_dense), default=0)
        chunks = max((m.step_bytes(tokens) for m in self.model.modules() if isinstance(m, GatedDelta)), default=0)
        adapters = 0 if self.adapters is None else 3 * tokens * self.adapters.width * item
        return layer + attention + logits + dequantized + chunks + adapters

    @property
    def _tp(self) -> int:
        return self.config.topology.tp

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        return [torch.zeros(shape, dtype=self.kv_dtype, device=self.device) for shape in self.cache_shapes(num_blocks)]

    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        """Nothing is compiled here; a prefill and a decode let libraries choose kernels and allocate."""
        engine = self.config.engine
        prompt = min(engine.max_num_batched_tokens, self.config.max_model_len, 64)
        shapes = ((1, prompt), (engine.max_num_seqs, 1))
        for done, (seqs, queries) in enumerate(shapes):
            progress("warming up", done, len(shapes))
            for adapted in (False, True) if self.adapters is not None else (False,):
                self.execute_model(self.dummy_input(seqs, queries, adapted), kv_caches,
                                   self.dummy_intermediate(seqs * queries))
        progress("warming up", len(shapes), len(shapes))

    def dummy_input(self, num_seqs: int, queries: int, adapted: bool = False) -> PagedModelInput:
        """Prompts of `queries` tokens (decoding sequences when it is 1) that write the null block alone. `adapted`: all
        have the adapter in slot 0."""
        return self.stage(self._dummy(num_seqs, queries, False, adapted))

    def dummy_round(self, num_seqs: int, drafts: int) -> PagedModelInput:
        """As dummy_input: a round of speculative decoding that verifies `drafts` drafts of each sequence and proposes
        as many, prepared as that of a request is."""
        return self.stage(self._dummy(num_seqs, 1 + drafts, True))

    def _dummy(self, num_seqs: int, queries: int, verified: bool, adapted: bool = False) -> Packed[PagedModelInput]:
        size, tokens, samples = self.config.engine.block_size, num_seqs * queries, num_seqs
        values: dict[str, Any] = {"block_size": size, "num_decode_seqs": num_seqs if queries == 1 else 0,
                                  "max_query_len": queries, "adapted": int(adapted)}
        also = ({"state_rows"} if self.has_row_states else set()) | ({"adapter_slots"} if adapted else set())
        if verified:
            samples, also = tokens, also | ({"sample_counts"} if queries > 1 else set())
            values |= {"num_proposals": queries - 1, "max_samples": queries}
        values["num_samples"] = samples
        dims = {"num_tokens": tokens, "num_seqs": num_seqs, "max_blocks": -(-queries // size), "num_logits": samples}
        if verified:
            larger, more = self.padding({**dims, "num_targets": 0}, values)
            dims, also = {**dims, "num_verified": num_seqs if queries > 1 else 0, **larger}, also | {*more}
        packed: Packed[PagedModelInput] = self.input_type.schema.allocate(dims, also, **values)
        at, counts = np.arange(tokens), np.full(num_seqs, queries)
        fields = {"positions": at % queries, "seq_lens": counts, "sample_counts": counts,
                  "query_start_loc": np.arange(num_seqs + 1) * queries,
                  "logits_indices": at if verified else at[queries - 1::queries], "adapter_slots": at * 0}
        for name in packed.arrays:
            packed.fill(name, fields.get(name))  # 0 is the null block, too
        return packed

    def dummy_intermediate(self, tokens: int) -> IntermediateTensors | None:
        """Zeros in place of the earlier stage's output; None on the first stage."""
        if self.config.topology.is_first_stage:
            return None
        size = self.config.model.hidden_size
        return self.model.make_intermediate(*(torch.zeros(tokens, size, dtype=self.dtype, device=self.device)
                                    for _ in self.model.intermediates))

    def prepare_model_input(self, request: ExecuteModelRequest) -> PagedModelInput:
        self.state.apply(request)
        return self.stage(self.state.prepare(request, self.padding))

    def padding(self, dims: Mapping[str, int], values: Mapping[str, Any]) -> tuple[Mapping[str, int], Iterable[str]]:
        """The larger sizes, and the optional fields, that a step of these sizes and scalars is prepared with."""
        return exact_shape(dims, values)

    def stage(self, packed: Packed[PagedModelInput]) -> PagedModelInput:
        """Bring an input that was made with `padding` to the device."""
        return packed.to(self.device)

    def on_device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy on the device, for which the host does not wait where the device runs behind it."""
        return torch.from_numpy(values).to(self.device)

    def prepare_sampling_input(self, sampling: SamplingRequest) -> SamplingInput:
        return self.state.prepare_sampling(sampling).to(self.device)

    def forward_context(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> ForwardContext:
        if self.loads is not None:
            self.loads.begin(m)
        if self.adapters is not None:
            self.adapters.begin(m.adapter_slots)
        return ForwardContext(self.attention.begin(m, kv_caches), m, self.states.begin(m) if self.row_states else None,
                              dict.fromkeys(self.taps) if self.taps else None)

    @torch.inference_mode()
    def execute_model(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                      intermediate: IntermediateTensors | None = None) -> SamplerOutput | IntermediateTensors | None:
        if model_input.num_steps > 1:
            return self.execute_steps(model_input, kv_caches)
        found = self.forward(model_input, kv_caches, intermediate)
        return found if isinstance(found, IntermediateTensors) else self.sample(found, model_input)

    def execute_steps(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> SamplerOutput | None:
        """`execute_model` for an input of several decode steps."""
        return take_steps(m, self.pending, lambda step: self.decode(step, kv_caches))

    def decode(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> SamplerOutput | None:
        """One of several decode steps; the model has no stages then."""
        found = self.forward(m, kv_caches, None)
        assert isinstance(found, Forwarded)
        return self.sample(found, m)

    @torch.inference_mode()
    def execute_forward(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                        intermediate: IntermediateTensors | None = None) -> Forwarded | IntermediateTensors:
        return self.forward(model_input, kv_caches, intermediate)

    @torch.inference_mode()
    def execute_sampling(self, forwarded: Forwarded, model_input: PagedModelInput) -> SamplerOutput | None:
        return self.sample(forwarded, model_input)

    def forward(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                intermediate: IntermediateTensors | None) -> Forwarded | IntermediateTensors:
        """Up to the logits. Every tensor-parallel rank computes its part of them."""
        context = self.forward_context(m, kv_caches)
        if self.selects_rows and self.model.selects_rows and 0 < len(m.logits_indices) < len(m.input_ids) and (
                m.adapter_slots is None and self.loads is None):  # both have a value for each token of the step
            context = dataclasses.replace(context, rows=m.logits_indices)
        hidden = self.model(self.pending.input_ids(m), m.positions, context, intermediate)
        if not isinstance(hidden, torch.Tensor):
            stage: IntermediateTensors = hidden
            return stage
        if context.rows is not None:
            m = copy.copy(m)
            m.logits_indices = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
        found = self.head(hidden, m)
        if not context.taps:
            return found
        return found._replace(taps=torch.cat([cast(torch.Tensor, context.taps[i]) for i in self.taps], -1))

    def head(self, hidden: torch.Tensor, m: PagedModelInput) -> Forwarded:
        """hidden [num_tokens, hidden_size] of the last stage -> what sampling starts from."""
        rows = hidden.index_select(0, m.logits_indices)
        return Forwarded(self.model.compute_logits(rows[:m.num_samples]), rows)

    def sample(self, forwarded: Forwarded, m: PagedModelInput) -> SamplerOutput | None:
        """The output on the rank that samples. Every tensor-parallel rank computes its part of the logits of prompt
        tokens."""
        n, samples, rows = m.num_samples, self.config.topology.samples, forwarded.hidden
        output = self.draw(forwarded.logits, m)
        if output is not None and m.sample_counts is not None:
            output = self.verify(output, m)
        self.pending.keep(m, None if output is None else output.token_ids)
        if m.prompt_targets is None or rows is None:
            return output
        parts, step = [], self.config.engine.max_num_seqs  # `reserve_bytes` counts so many at a time
        for at in range(0, len(m.prompt_targets), step):
            targets = m.prompt_targets[at:at + step]
            logits = self.model.compute_logits(rows[n + at:n + at + len(targets)])
            if samples:
                parts.append(logprobs(logits, targets, m.num_prompt_logprobs))
        if output is None:
            return None
        of_targets = TokenLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))
        for name, value in of_targets.fields("prompt_").items():
            setattr(output, name, value)
        return output

    def verify(self, sampled: SamplerOutput, m: PagedModelInput) -> SamplerOutput:
        """The tokens that each row gains, of a step with drafts."""
        assert m.sample_counts is not None
        return verify(sampled, drafts_behind(m), m.sample_counts, m.max_samples)

    def draw(self, logits: torch.Tensor, m: PagedModelInput) -> SamplerOutput | None:
        """The sampler's output, on the rank that samples."""
        if not self.config.topology.samples:
            return None
        with span("sample"):
            return self.sampler(logits, m)
