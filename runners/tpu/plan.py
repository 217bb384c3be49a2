"""The shapes that the TPU's runner compiles, in steps as fine as the start-up budget allows."""

from __future__ import annotations

import os
from itertools import zip_longest

from hal.config import WorkerConfig
from hal.errors import ConfigError
from hal.paged.shape_plan import Bucket, ShapePlan, finest, ladder
from runners.tpu import lowering

_ONE = 1e9  # a single rung
# Growth from rung to rung, finest first, of: sequences of a decode, blocks of a context, tokens of a mixed step, its
# sequences. Padding costs time in every step; compiling costs time in every cold start.
_GROWTH = ((2, 2, 2, 4), (2, 4, 4, 8), (4, 4, 4, _ONE), (4, 16, 8, _ONE), (8, _ONE, 16, _ONE), (_ONE,) * 4)
_BUDGET = 120.0
_BUDGET_UNSTORED = 20.0  # if programs cannot be kept on disk, every start is a cold one
_TOKENS, _BLOCKS, _SEQS = 16, 4, 4  # smallest rungs: below them padding is cheap


def budget() -> float:
    """Seconds that a cold start may compile: HAL_COMPILE_BUDGET, else 120, or 20 if compiled programs cannot be kept on
    disk (XLA's CPU client). With 0, each program is compiled when a step first needs it. With "inf", all are compiled
    in the warm-up.

    Raises:
        ConfigError: HAL_COMPILE_BUDGET is not a number of seconds.
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
    """Seconds to compile a program, roughly: measured on XLA's CPU client with one thread (benchmarks/xla.py)."""
    return 0.2 + 0.4 * num_layers


def make_plan(config: WorkerConfig) -> ShapePlan:
    """The shape plan. It follows from the configuration alone, so all ranks have the same plan."""
    engine = config.engine
    blocks = -(-config.max_model_len // engine.block_size)
    tokens, seqs = engine.max_num_batched_tokens, min(engine.max_num_seqs, engine.max_num_batched_tokens)
    # A step with drafts samples several tokens of a sequence. It has as many places for sequences as it samples.
    samples = min(seqs * engine.max_samples, tokens)
    layers = -(-config.model.num_layers // engine.pp)  # layers of the largest stage, so that all stages have one plan
    return finest((ShapePlan({
        "decode": {"num_seqs": _rungs(seqs, a, 1), "max_blocks": _rungs(blocks, b, _BLOCKS)},
        "mixed": {"num_tokens": _rungs(tokens, c, _TOKENS), "num_seqs": _rungs(samples, d, _SEQS),
                  "max_blocks": _rungs(blocks, b, _BLOCKS)},
    }) for a, b, c, d in _GROWTH), seconds_each(layers), budget())


def by_need(plan: ShapePlan, largest_first: bool) -> list[Bucket]:
    """All buckets in the order in which a warm-up of limited time compiles them: from the smallest to the largest. The
    kinds take turns, since every request needs a step of each kind.

    Args:
        largest_first: each kind's largest bucket comes before all others. It shows whether the device's memory can hold
            a step.
    """
    kinds = [[bucket for bucket in plan.buckets() if bucket.kind == kind] for kind in plan.kinds]
    begin = [of_kind.pop(0) for of_kind in kinds] if largest_first else []
    return begin + [bucket for turn in zip_longest(*map(reversed, kinds)) for bucket in turn if bucket is not None]


def _rungs(limit: int, growth: float, first: int) -> tuple[int, ...]:
    return (limit,) if growth == _ONE else ladder(limit, growth, first)
