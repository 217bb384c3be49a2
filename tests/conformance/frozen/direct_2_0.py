"""Written against hal.contracts 2.0, and never edited: a runner of its own, without the library's models.

A copy of the null backend of that version. When a test of this file fails, a contract has changed. Then
hal.contracts.VERSION must say so, and a copy for the new version goes beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hal.config import WorkerConfig
from hal.contracts.backend import Backend, Capabilities
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import IntermediateTensors, PagedModelInput, SamplingInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.contracts.runner import ModelRunnerBase, Progress, no_progress
from hal.paged.batch import BatchState
from hal.paged.pending import PendingTokens
from hal.paged.steps import take_steps
from hal.profiling import span
from hal.sampling.sampler import Sampler, logprobs
from hal.sampling.verification import drafts_behind, verify
from hal.schema import Array

# What one pipeline stage hands to the next. A model of tensors would declare its hidden states here.
NullIntermediate = IntermediateTensors.declare("NullIntermediate", sums=Array("int64", "num_tokens"))


class NullRunner(ModelRunnerBase[PagedModelInput]):
    """Each layer writes to a token's slot a number made of the token and its position, and adds up the numbers of each
    token's context. Tensor-parallel ranks share the positions. The total decides the next token."""

    input_type, output_type = PagedModelInput, SamplerOutput
    two_phase = verifies = multi_step = True
    intermediate_type = NullIntermediate

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator)
        engine = config.engine
        self.tokens_per_row = max(self.tokens_per_row, engine.max_samples)
        self.layers = config.topology.layers(config.model.num_layers)
        self.state = BatchState(engine.max_num_seqs, config.max_model_len, engine.block_size, config.model.vocab_size,
                                asynchronous=bool(engine.async_scheduling) and self.tokens_per_row == 1)
        self.pending = PendingTokens(engine.max_num_seqs, device, communicator)
        self.sampler = Sampler()

    def load_model(self, progress: Progress = no_progress) -> None:
        progress("loading nothing", 1, 1)

    def kv_bytes_per_block(self) -> int:
        return len(self.layers) * self.config.engine.block_size * 4

    def reserve_bytes(self) -> int:
        """Bytes of the gathered contexts of the largest step: three int32 for each token and position of its context.
        """
        return self.config.engine.max_num_batched_tokens * self.config.max_model_len * 12

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        shape = 1, num_blocks, self.config.engine.block_size
        return [torch.zeros(shape, dtype=torch.int32, device=self.device) for _ in self.layers]

    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        progress("warming up nothing", 1, 1)

    def prepare_model_input(self, request: ExecuteModelRequest) -> PagedModelInput:
        self.state.apply(request)
        return self.state.prepare(request).to(self.device)

    def prepare_sampling_input(self, sampling: SamplingRequest) -> SamplingInput:
        return self.state.prepare_sampling(sampling).to(self.device)

    def execute_model(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                      intermediate: IntermediateTensors | None = None) -> SamplerOutput | IntermediateTensors | None:
        if model_input.num_steps > 1:
            return take_steps(model_input, self.pending, lambda m: self.decode(m, kv_caches))
        found = self.execute_forward(model_input, kv_caches, intermediate)
        return found if isinstance(found, IntermediateTensors) else self.execute_sampling(found, model_input)

    def decode(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> SamplerOutput | None:
        """One of several decode steps; the model has no stages then."""
        sums = self.execute_forward(m, kv_caches)
        assert isinstance(sums, torch.Tensor)
        return self.execute_sampling(sums, m)

    def execute_forward(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                        intermediate: IntermediateTensors | None = None) -> torch.Tensor | IntermediateTensors:
        m = model_input
        input_ids = self.pending.input_ids(m)
        sums = torch.zeros(len(m.input_ids), dtype=torch.int64) if intermediate is None else intermediate["sums"]
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            found = self.communicator.all_reduce(self.attend(cache, m, input_ids, layer))
            sums = (sums + found) % (1 << 31)
        if not self.config.topology.is_last_stage:
            return NullIntermediate(sums=sums)  # type: ignore[call-arg]  # declared at run time
        return sums[m.logits_indices]

    def execute_sampling(self, forwarded: torch.Tensor, model_input: PagedModelInput) -> SamplerOutput | None:
        m = model_input
        output = self.sample(forwarded, m) if self.config.topology.samples else None
        self.pending.keep(m, None if output is None else output.token_ids)
        return output

    def attend(self, cache: torch.Tensor, m: PagedModelInput, input_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """Write the step's tokens to their slots, then read each token's context. [num_tokens] int64."""
        mixed = (input_ids.long() + 7) * (m.positions.long() * 31 + layer + 11) % 65521
        cache.view(-1)[m.slot_mapping] = mixed.int()
        tp, tp_rank = self.config.topology.tp, self.config.topology.tp_rank
        context = cache[0, m.block_tables].flatten(1)[:, tp_rank::tp]  # [num_seqs, share of the positions]
        if m.num_decode_seqs < len(context):
            queries = m.query_start_loc.diff()
            context = context[torch.repeat_interleave(torch.arange(len(queries)), queries)]
        place = torch.arange(tp_rank, m.block_tables.shape[1] * m.block_size, tp, dtype=torch.int32)
        return (context * (place <= m.positions[:, None])).sum(1)

    def sample(self, sums: torch.Tensor, m: PagedModelInput) -> SamplerOutput:
        """Sample with the real sampler, from logits that are highest for the token that the sum decides."""
        vocab = self.config.model.vocab_size
        logits = (torch.arange(vocab) - sums[:, None]).remainder(vocab) / -4.0
        with span("sample"):
            output = self.sampler(logits, m)
        if m.sample_counts is not None:
            output = verify(output, drafts_behind(m), m.sample_counts, m.max_samples)
        if m.prompt_targets is not None:
            found = logprobs(logits[m.num_samples:], m.prompt_targets, m.num_prompt_logprobs)
            for name, value in found.fields("prompt_").items():
                setattr(output, name, value)
        return output


class NullBackend(Backend):
    name = "direct_2_0:backend"
    priority = -100  # never what "auto" means
    capabilities = Capabilities(contracts="2.0", dtypes=("float32", "bfloat16", "float16"), max_tp=64, max_pp=64,
                                checkpoints=False, batch_invariant="always")

    def unavailable(self) -> str | None:
        return None

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def free_memory(self, device: torch.device) -> int:
        return 16 << 30  # invented, so that sizes do not depend on the machine

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> NullRunner:
        return NullRunner(config, device, communicator)


backend = NullBackend()
