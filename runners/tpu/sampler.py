"""Sampling of static shapes, by the same rules and the same noise as `hal.sampling.sampler`: the same tokens.

The default sampler examines some candidates, and sorts a whole row only if it must, which it decides on the host. Here
a filtered row is always sorted, because a program cannot decide this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hal.features import adjusting
from hal.sampling.noise import exponential, row_keys
from hal.sampling.sampler import checked, reference, threshold

# XLA treats subnormal numbers as 0. So the temperature must not be subnormal, and must not make the scores subnormal.
_NORMAL = torch.finfo(torch.float32).tiny
_FLAT = 2.0**40  # a temperature of so many times the largest score makes all tokens equally likely


def sample(logits: torch.Tensor, positions: torch.Tensor, m: Mapping[str, Any]) -> torch.Tensor:
    """A token a row, [n] int32; greedy where the temperature is 0 or subnormal, -1 where no logit is a finite maximum.

    Args:
        logits: [n, vocab]. positions: [n], of the tokens that the logits follow.
        m: the fields of one sampling program, of n rows each, by name; fields of no program are None.
    """
    scores = logits.to(torch.float32, copy=True)  # features may change it
    for feature in adjusting(m):
        scores = feature.adjust(scores, m)
    temperature, seed, top_k, top_p, min_p = (m[name] for name in ("temperature", "seed", "top_k", "top_p", "min_p"))
    greedy = temperature < _NORMAL
    best, top = scores.argmax(-1), largest(scores)
    size = torch.where(scores.abs() < torch.inf, scores.abs(), 0.0).amax(-1)
    temperature = torch.where(greedy, 1.0, temperature).minimum((size * _FLAT).clamp(min=1.0))
    scores = (scores - reference(top, temperature)[:, None]) / temperature[:, None]
    ids = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)[None]
    race = scores - exponential(row_keys(seed, positions + 1), ids).log()
    if top_k is not None:
        top_k, top_p, min_p = (x[:, None] for x in (top_k, top_p, min_p))
        lowest = threshold(scores.sort(-1, descending=True).values, top_k, top_p, min_p, scores.logsumexp(-1, True))
        race = race.masked_fill(scores < lowest, -torch.inf)
    return checked(torch.where(greedy, best, race.argmax(-1)), top).int()


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """logits [n, vocab] -> [n] int32, -1 where no logit is a finite maximum."""
    return checked(logits.argmax(-1), largest(logits)).int()


def largest(scores: torch.Tensor) -> torch.Tensor:
    """[n, vocab] -> [n]: each row's maximum, infinite where the row has NaN."""
    return torch.where(scores < torch.inf, scores, torch.inf).amax(-1)
