"""Which shapes the TPU's runner compiles: as fine as the start-up budget allows."""

from __future__ import annotations

import os
from itertools import zip_longest

from hal.config import WorkerConfig
from hal.errors import ConfigError
from hal.paged.shape_plan import Bucket, ShapePlan, finest, ladder
from runners.tpu import lowering

_ONE = 1e9  # a single rung
# Growth from rung to rung, finest first: sequences of a decode, blocks of a context, tokens of a mixed step, its
# sequences. What is padded in vain costs time in every step; what is compiled costs time at every cold start.
_GROWTH = ((2, 2, 2, 4), (2, 4, 4, 8), (4, 4, 4, _ONE), (4, 16, 8, _ONE), (8, _ONE, 16, _ONE), (_ONE,) * 4)
_BUDGET = 120.0
_BUDGET_UNSTORED = 20.0  # where programs cannot be kept on disk every start is a cold one
_TOKENS, _BLOCKS, _SEQS = 16, 4, 4  # smallest rungs: below them padding is cheap


def budget() -> float:
    """Seconds of compiling that a cold start may take: HAL_COMPILE_BUDGET; else 120, or 20 where compiled programs
    cannot be kept on disk (XLA's CPU client). With 0 each program is compiled when a step first needs it, with "inf"
    none is.

    Raises:
        ConfigError: HAL_COMPILE_BUDGET is not such a number.
    """
    given = os.environ.get("HAL_COMPILE_BUDGET")
    if given is None:
        return _BUDGET if lowering.cache_folder() is not None else _BUDGET_UNSTORED
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # NaN included
        raise ConfigError("HAL_COMPILE_BUDGET is not a number of seconds", got=repr(given),
                          expected='0 or more, or "inf"')
    return seconds


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


def by_need(plan: ShapePlan, largest_first: bool) -> list[Bucket]:
    """All buckets in the order in which a warm-up of limited time compiles them: from the smallest up, the kinds in
    turn, since every request needs a step of each kind.

    Args:
        largest_first: before all others each kind's largest, which shows whether the device's own memory holds a step.
    """
    kinds = [[bucket for bucket in plan.buckets() if bucket.kind == kind] for kind in plan.kinds]
    begin = [of_kind.pop(0) for of_kind in kinds] if largest_first else []
    return begin + [bucket for turn in zip_longest(*map(reversed, kinds)) for bucket in turn if bucket is not None]


def _rungs(limit: int, growth: float, first: int) -> tuple[int, ...]:
    return (limit,) if growth == _ONE else ladder(limit, growth, first)
