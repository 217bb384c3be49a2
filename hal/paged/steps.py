"""Several decode steps for one message: each input is made on the device from the one before it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from hal.contracts.advance import Taken
from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.paged.pending import PendingTokens

_BESIDE = ("logprobs", "ranks", "top_ids", "top_logprobs")  # arrays of SamplerOutput beside token_ids


def take_steps(m: PagedModelInput, pending: PendingTokens,
               step: Callable[[PagedModelInput], SamplerOutput | None]) -> SamplerOutput | None:
    """Take the `num_steps` decode steps of an input. Nothing waits for the device, except on a CPU, where the steps end
    early when no sequence goes on.

    Args:
        step: executes one decode step and keeps its tokens in `pending`.

    Returns:
        The tokens of all steps on the rank that samples; see `joined`.
    """
    n, outputs = m.num_samples, list[SamplerOutput | None]()
    going = m.seq_lens > 0
    counts = torch.zeros(n, dtype=torch.int32, device=m.seq_lens.device)
    strict = os.environ.get("HAL_STRICT") == "1" and going.is_cpu
    for place in range(m.num_steps):
        counts += going[:n]
        outputs.append(step(m))
        if place + 1 == m.num_steps:
            break
        tokens = pending.taken
        assert tokens is not None
        going = goes_on(m, tokens, place + 1, going)
        if going.is_cpu and not going.any():
            break
        tokens = torch.nn.functional.pad(tokens, (0, len(going) - n))
        m = m.advance(Taken(tokens, going))
        if strict and going[:n].all():
            m.check()
    return joined(outputs, counts)


def goes_on(m: PagedModelInput, tokens: torch.Tensor, count: int, going: torch.Tensor) -> torch.Tensor:
    """bool [num_seqs]: which sequences take a further step, after `count` steps of this message, of which the last gave
    `tokens` [num_samples]. Those that were not `going` do not."""
    n = len(tokens)
    ended = (tokens[:, None] == m.stop_ids[:n]).any(1) | (tokens < 0) | (m.max_new[:n] <= count)
    return going & ~torch.nn.functional.pad(ended, (0, len(going) - n), value=True)


def joined(outputs: Sequence[SamplerOutput | None], counts: torch.Tensor) -> SamplerOutput | None:
    """One output out of those of each step. `counts`: int32 [num_samples], the steps that each sequence took."""
    several = [output for output in outputs if output is not None]
    if not several:
        return None
    found = {name: torch.stack([output[name] for output in several], 1).flatten(0, 1)
             for name in ("token_ids", *_BESIDE) if several[0][name] is not None}
    return SamplerOutput(**found, counts=counts, num_computed=counts - 1)
