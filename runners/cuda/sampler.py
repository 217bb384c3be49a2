"""The default sampler, with its searches over the vocabulary in Triton. It takes two or three launches, and never
waits.
"""

from __future__ import annotations

import torch

from hal.contracts.inputs import PagedModelInput
from hal.sampling.sampler import Sampler
from runners.cuda.kernels.sampling import greedy, thresholds


class CudaSampler(Sampler):
    """`alike`: a draw has one reference for the whole row. Otherwise large scores have one for each piece of a row, and
    the number of pieces depends on the number of rows."""

    def __init__(self, alike: bool = False) -> None:
        self.alike = alike

    def greedy(self, scores: torch.Tensor) -> torch.Tensor:
        return greedy(scores)

    def _draw(self, scores: torch.Tensor, m: PagedModelInput) -> torch.Tensor:
        assert m.temperature is not None
        filters = m.top_k, m.top_p, m.min_p
        limits: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if self.alike or any(x is not None for x in filters):
            limits = thresholds(scores, m.temperature, *filters)
        return greedy(scores, draw=(m.temperature, *limits, m.seed, m.positions, m.logits_indices))
