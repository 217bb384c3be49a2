"""Verification of drafts. It needs no probabilities of the proposer, and keeps the target model's distribution exactly.

The sampler draws at each place of a row the token that plain decoding would draw there, if the drafts before it are the
right tokens: with the noise of the request's seed and of that position. A draft is accepted if it equals the token that
was drawn at the place before it. So the output is token for token that of plain decoding, whatever proposed the drafts.
A proposer that draws with the same noise is accepted more often (Gumbel-max coupling: Daliri, Musco, Suresh, "Coupling
without communication and drafter-invariant speculative decoding", arXiv 2408.07978).
"""

from __future__ import annotations

import torch

from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput

_OF_PLACES = ("logprobs", "ranks", "top_ids", "top_logprobs")


def verified_tokens(most: int) -> tuple[int, ...]:
    """The numbers of tokens of a sequence for which programs are prepared, where a step verifies up to `most` drafts:
    1 + most, and one token behind each half of the drafts before, so that fewer drafts cost less."""
    found = [most]
    while found[-1] > 2:
        found.append(-(-found[-1] // 2))
    return tuple(1 + n for n in reversed(found))


def drafts_behind(m: PagedModelInput) -> torch.Tensor:
    """int32 [num_samples]: the token behind each place to sample. Behind the last place of a row it has no meaning."""
    return m.input_ids[(m.logits_indices[:m.num_samples] + 1).clamp(max=len(m.input_ids) - 1)]


def verify(sampled: SamplerOutput, drafts: torch.Tensor, sample_counts: torch.Tensor, max_samples: int,
           ) -> SamplerOutput:
    """The tokens that each row gains: the accepted drafts, and the token drawn behind them.

    Args:
        sampled: a token for each place, without prompt logprobs. drafts: see `drafts_behind`.
        sample_counts, max_samples: see PagedModelInput. All tensors are on one device, for which nothing here waits.
    """
    n, rows, device = len(sampled.token_ids), len(sample_counts), sampled.token_ids.device
    within = torch.arange(max_samples, device=device)
    if n == rows * max_samples:
        places = torch.arange(n, device=device).view(rows, max_samples)
    else:
        firsts = sample_counts.cumsum(0) - sample_counts
        places = (firsts[:, None] + within).clamp(max=n - 1)
    tokens = sampled.token_ids[places]
    agrees = (tokens == drafts[places]) & (within < sample_counts[:, None] - 1)
    accepted = agrees.int().cumprod(1).sum(1, dtype=torch.int32)
    flat = places.view(-1)
    found = {name: value[flat] for name in _OF_PLACES if (value := sampled[name]) is not None}
    return SamplerOutput(token_ids=tokens.view(-1), counts=accepted + 1, num_computed=accepted, **found)
