"""The default sampler, with its searches over the vocabulary in Triton. It takes two or three launches, and never
waits.
"""

from __future__ import annotations

import torch

from hal.contracts.inputs import PagedModelInput
from hal.sampling.sampler import Sampler
from runners.cuda.kernels.sampling import greedy, thresholds


class CudaSampler(Sampler):
    def greedy(self, scores: torch.Tensor) -> torch.Tensor:
        return greedy(scores)

    def _draw(self, scores: torch.Tensor, m: PagedModelInput) -> torch.Tensor:
        assert m.temperature is not None
        filters = m.top_k, m.top_p, m.min_p
        limits: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if any(x is not None for x in filters):
            limits = thresholds(scores, m.temperature, *filters)
        return greedy(scores, draw=(m.temperature, *limits, m.seed, m.positions, m.logits_indices))
