"""The default sampler with the two searches over the vocabulary that numpy does several times faster on a CPU."""

from __future__ import annotations

import numpy as np
import torch

from hal.sampling.sampler import Sampler


class CpuSampler(Sampler):
    def argmax(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(scores.float().numpy().argmax(-1))

    def descending(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sort(scores.numpy(), -1)).flip(-1)
