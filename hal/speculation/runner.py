"""The composition of a target runner and a proposer on the ranks, as one runner under the one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hal.config import WorkerConfig
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import IntermediateTensors, PagedModelInput, SamplingInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.proposer import RankProposer, proposer_class
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.contracts.runner import ModelRunnerBase, Progress, no_progress
from hal.errors import ConfigError


def compose(target: ModelRunnerBase[Any], config: WorkerConfig, device: torch.device,
            communicator: Communicator) -> ModelRunnerBase[Any]:
    """The runner of a rank whose engine speculates: the target itself where the proposals come from the host, or from a
    later pipeline stage.

    Raises:
        ConfigError: the proposer is unknown, or the target cannot verify drafts.
    """
    engine = config.engine
    if engine.speculate is None:
        return target
    kind = proposer_class(engine.speculate)
    if not target.verifies:
        raise ConfigError("this device's model runner does not verify drafts", got=f"speculate={engine.speculate!r} "
                          f"with {type(target).__name__}", expected="a runner that declares `verifies`")
    if not issubclass(kind, RankProposer) or not config.topology.is_last_stage:
        return target
    if not target.two_phase:
        raise ConfigError("a proposer on the ranks needs the target's forward pass and sampling as two parts",
                          got=f"speculate={engine.speculate!r} with {type(target).__name__}",
                          expected="a runner that declares `two_phase`", hint='speculate="ngram" needs no second model')
    return SpeculativeRunner(target, kind(config, device, communicator, target))


class LateDrafts(SamplerOutput):
    """An output on the host whose proposals arrive after the rest. Reading `draft_tokens` waits for them; from then on
    this is a SamplerOutput like any other."""

    @classmethod
    def of(cls, output: SamplerOutput, later: Callable[[], torch.Tensor]) -> LateDrafts:
        late = cls.__new__(cls)
        late.__dict__.update(output.__dict__, later=later)
        return late

    @property  # type: ignore[misc]
    def draft_tokens(self) -> torch.Tensor:  # type: ignore[override]
        proposed: torch.Tensor = self.__dict__.pop("later")()
        self.__class__ = SamplerOutput  # type: ignore[assignment]
        self.__dict__["draft_tokens"] = proposed
        return proposed


class SpeculativeRunner(ModelRunnerBase[PagedModelInput]):
    """The target's runner, behind whose sampler the proposer runs. Both share the step's input, and the block ids of
    their caches: the target's come first in `kv_caches`.

    Attributes: target, proposer: the two parts.
    """

    two_phase = verifies = True

    def __init__(self, target: ModelRunnerBase[Any], proposer: RankProposer) -> None:
        super().__init__(target.config, target.device, target.communicator)
        self.target, self.proposer = target, proposer
        self.input_type, self.output_type = target.input_type, target.output_type  # type: ignore[misc]
        self.tokens_per_row = target.tokens_per_row
        self._early: tuple[SamplerOutput, Callable[[], SamplerOutput]] | None = None  # the last output, on its way
        self._caches = 0  # how many of kv_caches are the target's

    @property
    def compiled(self) -> int:  # type: ignore[override]
        return self.target.compiled

    @property
    def late(self) -> int:  # type: ignore[override]
        return self.target.late

    @property
    def uncompiled(self) -> int:  # type: ignore[override]
        return self.target.uncompiled

    @property
    def rounds(self) -> Sequence[tuple[int, int]]:  # type: ignore[override]
        return self.target.rounds

    def dummy_round(self, num_seqs: int, drafts: int) -> PagedModelInput:
        made: PagedModelInput = self.target.dummy_round(num_seqs, drafts)  # type: ignore[attr-defined]
        return made

    def load_model(self, progress: Progress = no_progress) -> None:
        self.target.load_model(progress)
        self.intermediate_type, self.has_row_states = self.target.intermediate_type, self.target.has_row_states
        self.proposer.load_model(progress)

    def expert_loads(self) -> np.ndarray[Any, Any] | None:
        return self.target.expert_loads()

    def kv_bytes_per_block(self) -> int:
        return self.target.kv_bytes_per_block() + self.proposer.kv_bytes_per_block()

    def reserve_bytes(self) -> int:
        return self.target.reserve_bytes() + self.proposer.reserve_bytes()

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        caches = self.target.make_kv_caches(num_blocks)
        self._caches = len(caches)
        return [*caches, *self.proposer.make_kv_caches(num_blocks)]

    # The worker calls these two in place of the base's, which are static.
    def read_blocks(self, kv_caches: Sequence[torch.Tensor], blocks: torch.Tensor,  # type: ignore[override]
                    ) -> list[torch.Tensor]:
        return self.target.read_blocks(kv_caches, blocks)

    def write_blocks(self, kv_caches: Sequence[torch.Tensor], blocks: torch.Tensor,  # type: ignore[override]
                     values: Sequence[torch.Tensor]) -> None:
        self.target.write_blocks(kv_caches, blocks, values)

    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        self.target.warmup(kv_caches[:self._caches], progress)
        self.proposer.warmup(kv_caches[self._caches:], progress)

    def load_adapter(self, slot: int, path: str) -> None:
        """The proposer has none: the target verifies its proposals with the adapter of each row."""
        self.target.load_adapter(slot, path)

    def prepare_model_input(self, request: ExecuteModelRequest) -> PagedModelInput:
        made: PagedModelInput = self.target.prepare_model_input(request)
        return made

    def prepare_sampling_input(self, sampling: SamplingRequest) -> SamplingInput:
        return self.target.prepare_sampling_input(sampling)

    def execute_model(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                      intermediate: IntermediateTensors | None = None) -> Any:
        forwarded = self.execute_forward(model_input, kv_caches, intermediate)
        return self.execute_sampling(forwarded, model_input)

    def execute_forward(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                        intermediate: IntermediateTensors | None = None) -> Any:
        forwarded = self.target.execute_forward(model_input, kv_caches[:self._caches], intermediate)
        return forwarded, kv_caches[self._caches:]

    @torch.inference_mode()
    def execute_sampling(self, forwarded: Any, model_input: PagedModelInput) -> Any:
        of_target, kv_caches = forwarded
        output: Any = self.target.execute_sampling(of_target, model_input)
        # The host gets the new tokens while the device proposes further ones; from another rank they come together.
        early = self.target.fetch(output) if output is not None and self.config.topology.world_size == 1 else None
        proposed = self.proposer.propose(model_input, self._on_all_ranks(output, model_input), of_target, kv_caches)
        if output is not None:
            output.draft_tokens = proposed
        self._early = None if early is None or proposed is None else (output, early)
        return output

    def _on_all_ranks(self, output: SamplerOutput | None, m: PagedModelInput) -> SamplerOutput:
        """The new tokens and their counts, on every tensor-parallel rank."""
        topology = self.config.topology
        if topology.tp == 1 and output is not None:
            return output
        rows = m.num_samples if m.sample_counts is None else len(m.sample_counts)
        width = m.max_samples
        both = torch.zeros(rows, width + 1, dtype=torch.int32, device=self.device)
        if output is not None:
            both[:, :width] = output.token_ids.view(rows, width)
            both[:, width] = 1 if output.counts is None else output.counts
        both = self.communicator.broadcast(both)
        tokens, counts = both[:, :width].reshape(-1), both[:, width].contiguous()
        return SamplerOutput(token_ids=tokens, counts=None if m.sample_counts is None else counts)

    def fetch(self, output: Any) -> Callable[[], Any]:
        if self._early is None or self._early[0] is not output:
            return self.target.fetch(output)
        early = self._early[1]
        later = self.target.fetch(SamplerOutput(token_ids=output.token_ids[:0], draft_tokens=output.draft_tokens))
        return lambda: LateDrafts.of(early(), lambda: later().draft_tokens)
