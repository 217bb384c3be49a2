"""Counts of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Counts:
    """Counts since the engine started, which LLM.restart keeps. Requests that are not complete have their cached tokens
    and their preemptions themselves. See Stats."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the engine started.

    Attributes:
        steps: submitted steps. prefill_tokens: tokens computed in chunks of prompts, with those that are computed again
            after a preemption. decode_tokens: sampled tokens. cached_tokens: prompt tokens found in the prefix cache.
        drafted_tokens, accepted_tokens: drafts of speculative decoding that steps have verified, and how many of them
            were right.
        running, waiting: requests at this moment.
        expert_loads: with EngineConfig.expert_loads, of each layer with experts the tokens that each expert was chosen
            for since the workers started; reading them waits for the device. None without it.
        used_blocks, num_blocks: KV blocks that running requests hold at this moment, and that there are for requests.
    """

    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    running: int
    waiting: int
    used_blocks: int
    num_blocks: int
    expert_loads: np.ndarray | None = field(default=None, compare=False)

    @property
    def expert_imbalance(self) -> float | None:
        """The load of a layer's most loaded expert over that of its average one, as a mean over the layers: 1.0 is
        balanced. None without expert_loads, and before any load."""
        loads = self.expert_loads
        if loads is None or not loads.sum(1).all():
            return None
        return float((loads.max(1) / loads.mean(1)).mean())
