"""Several decode steps for one message, as one program: the steps follow one another in it, and each input is made from
the one before it by the rules that the input declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from hal.contracts.outputs import SamplerOutput
from hal.features.masks import TokenMasks
from hal.features.stopping import Stopping
from hal.paged.steps import take_steps
from runners.tpu.inputs import ADJUSTED, DRAWN, FILTERED, TpuModelInput
from runners.tpu.sampler import sample

STOPPING = tuple(Stopping.fields)
# What a program of each kind reads to sample. A step of several tokens has no masks, which come from the host.
KINDS = {"greedy": (), "drawn": DRAWN, "filtered": FILTERED,
         "adjusted": tuple(name for name in ADJUSTED if name not in TokenMasks.fields)}
# (input, caches) -> new caches, logits [n, vocab_size], most likely tokens [n], positions [n]
Forward = Callable[[TpuModelInput, Sequence[torch.Tensor]],
                   tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]]


class Steps(NamedTuple):
    """The results of such a program of n rows and k steps, on the device.

    Attributes:
        token_ids: int32 [n * k], row after row. counts: int32 [n], the steps that each row took.
        taken: of each step, int32 [n]. logits: of each step, [n, vocab_size].
    """

    token_ids: torch.Tensor
    counts: torch.Tensor
    taken: list[torch.Tensor]
    logits: list[torch.Tensor]

    @classmethod
    def of(cls, results: Sequence[torch.Tensor]) -> Steps:
        k = len(results) // 2 - 1
        return cls(results[0], results[1], [*results[2:2 + k]], [*results[2 + k:]])


def kind_of(m: TpuModelInput) -> str:
    """Which of KINDS an input's fields ask for."""
    return next(kind for kind in reversed(KINDS) if all(m[name] is not None for name in KINDS[kind]))


def trace_steps(forward: Forward, values: Mapping[str, torch.Tensor], caches: Sequence[torch.Tensor], block_size: int,
                steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The new caches and the results (see Steps). values: arrays of an input whose sequences all decode, by name."""
    n = len(values["seq_lens"])
    held, taken, logits = [*caches], list[torch.Tensor](), list[torch.Tensor]()
    pending: Any = SimpleNamespace(taken=None)
    drawn = "temperature" in values

    def step(m: TpuModelInput) -> SamplerOutput:
        held[:], scores, tokens, positions = forward(m, held)
        if drawn:
            tokens = sample(scores, positions, {name: m[name] for name in ADJUSTED})
        taken.append(tokens)
        logits.append(scores)
        pending.taken = tokens
        return SamplerOutput(token_ids=tokens)

    first: Any = TpuModelInput(**values, block_size=block_size, num_decode_seqs=n, max_query_len=1, num_samples=n,
                               num_steps=steps)
    output = take_steps(first, pending, step)
    assert output is not None and output.counts is not None
    return held, [output.token_ids, output.counts, *taken, *logits]
