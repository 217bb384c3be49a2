"""Which shapes the TPU's runner compiles: as fine as the start-up budget allows."""

from __future__ import annotations

import os

from hal.config import WorkerConfig
from hal.shape_plan import ShapePlan, finest, ladder

_ONE = 1e9  # a single rung
# Growth from rung to rung, finest first: sequences of a decode, blocks of a context, tokens of a mixed step, its
# sequences. What is padded in vain costs time in every step; what is compiled costs time at every cold start.
_GROWTH = ((2, 2, 2, 4), (2, 4, 4, 8), (4, 4, 4, _ONE), (4, 16, 8, _ONE), (8, _ONE, 16, _ONE), (_ONE,) * 4)
_BUDGET = 120.0
_TOKENS, _BLOCKS, _SEQS = 16, 4, 4  # smallest rungs: below them padding is cheap


def budget() -> float:
    """Seconds of compiling that a cold start may take: HAL_COMPILE_BUDGET, else 120."""
    return float(os.environ.get("HAL_COMPILE_BUDGET", _BUDGET))


def seconds_each(num_layers: int) -> float:
    """What a program takes, roughly: measured on XLA's CPU client with one thread (benchmarks/xla.py)."""
    return 0.2 + 0.4 * num_layers


def make_plan(config: WorkerConfig) -> ShapePlan:
    """From the configuration alone, so that all ranks have the same plan."""
    engine = config.engine
    blocks = -(-config.max_model_len // engine.block_size)
    tokens, seqs = engine.max_num_batched_tokens, min(engine.max_num_seqs, engine.max_num_batched_tokens)
    layers = -(-config.model.num_layers // engine.pp)  # of the largest stage: a plan of its own would part the ranks
    return finest((ShapePlan({
        "decode": {"num_seqs": _rungs(seqs, a, 1), "max_blocks": _rungs(blocks, b, _BLOCKS)},
        "mixed": {"num_tokens": _rungs(tokens, c, _TOKENS), "num_seqs": _rungs(seqs, d, _SEQS),
                  "max_blocks": _rungs(blocks, b, _BLOCKS)},
    }) for a, b, c, d in _GROWTH), seconds_each(layers), budget())


def _rungs(limit: int, growth: float, first: int) -> tuple[int, ...]:
    return (limit,) if growth == _ONE else ladder(limit, growth, first)
