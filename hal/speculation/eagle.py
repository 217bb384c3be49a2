"""Proposals of an EAGLE-3 head (see hal.models.eagle3), which reads hidden states that the target has computed.

At the last place of a chunk of a prompt, the next token is not in the step. The head then reads the last token of the
chunk in its place, and so may propose a little worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hal.config import EngineConfig, WorkerConfig
from hal.contracts.advance import Taken
from hal.contracts.inputs import IntermediateTensors, PagedModelInput
from hal.contracts.runner import Progress, no_progress
from hal.errors import ConfigError
from hal.model_config import ModelConfig
from hal.models.eagle3 import Eagle3
from hal.paged.runner import Forwarded, PagedModelRunner
from hal.schema.packed import on_host
from hal.speculation.draft import DraftProposer


class EagleProposer(DraftProposer):
    kind = "eagle"
    behind = 1
    cost = 0.05

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Any, target: Any) -> None:
        super().__init__(config, device, communicator, target)
        eagle = self.runner.config.model.eagle
        assert eagle is not None
        target.taps = eagle.taps

    @classmethod
    def check(cls, engine: EngineConfig, target: ModelConfig) -> ModelConfig:
        """As DraftProposer.check. Also refuses pipeline stages, whose hidden states would have to travel."""
        if engine.pp > 1:
            raise ConfigError("an EAGLE-3 head reads hidden states of layers in every pipeline stage",
                              got=f"speculate={engine.speculate!r}, pp={engine.pp}", expected="pp=1",
                              hint="use tp, or a draft model")
        return super().check(engine, target)

    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        eagle, embedding = self.runner.config.model.eagle, self.target.model.embed
        assert eagle is not None
        if eagle.own_embeddings:
            return
        if self.config.engine.draft_tp != self.config.topology.tp:  # the rank that computes needs the whole table
            whole = self.communicator.all_gather(embedding.weight, dim=0)
            if self.runs:
                embedding = _Whole(whole)
        if self.runs:
            self.runner.model.embed = embedding

    def reserve_step(self) -> int:
        return PagedModelRunner.reserve_bytes(self.runner)  # a device's own would run the head without hidden states

    def warmup(self, kv_caches: Any, progress: Progress = no_progress) -> None:
        """Nothing: the target's warm-up has no hidden states for the head."""

    def given(self, m: PagedModelInput, forwarded: Forwarded) -> IntermediateTensors:
        model = self.runner.model
        assert isinstance(model, Eagle3) and forwarded.taps is not None
        return model.make_intermediate(model.combine(forwarded.taps[:int(on_host(m, "query_start_loc")[-1])]))

    def further(self, before: PagedModelInput, step: PagedModelInput, tokens: torch.Tensor,
                hidden: torch.Tensor | None, count: int, kv_caches: Sequence[torch.Tensor]) -> torch.Tensor:
        assert hidden is not None
        limit, proposed = self.config.max_model_len, []
        for _ in range(count):
            before, step = step, step.advance(Taken(tokens, step.seq_lens < limit))
            before.input_ids = step.input_ids  # the head reads a token at the place before the token's own
            found = self.runner.forward(before, kv_caches, self.runner.model.make_intermediate(hidden))
            assert isinstance(found, Forwarded) and found.hidden is not None
            hidden, tokens = found.hidden, self.runner.sampler(found.logits, step).token_ids.clamp(min=0)
            proposed.append(tokens.where(step.seq_lens < limit, -1))
        return torch.stack(proposed, 1)


class _Whole(torch.nn.Module):
    """A whole embedding table on one rank."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(input_ids, self.weight)
