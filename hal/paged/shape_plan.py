"""The shapes for which a device compiles programs or captures graphs, declared before the first step.

A kind of step (say "decode") has axes. Each axis is a symbol of the step's input with a ladder of sizes. A step is
padded to the smallest rungs that hold it. So every legal step has exactly one bucket, and the cost of a start is known.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from hal.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Bucket:
    """One program. Attributes: kind, and (symbol, size) of each axis."""

    kind: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def dims(self) -> dict[str, int]:
        return dict(self.sizes)

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{symbol}={size}' for symbol, size in self.sizes)})"


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """Attributes: kinds: of each kind of step its axes, and of each axis the ascending rungs; the last is its limit."""

    kinds: Mapping[str, Mapping[str, tuple[int, ...]]]

    def __len__(self) -> int:
        return sum(prod(map(len, axes.values())) for axes in self.kinds.values())

    def buckets(self) -> list[Bucket]:
        """All programs, by kind, each kind's largest first (what does not fit in memory is found at once)."""
        return [Bucket(kind, tuple(zip(axes, sizes, strict=True))) for kind, axes in self.kinds.items()
                for sizes in product(*(reversed(rungs) for rungs in axes.values()))]

    def bucket_for(self, kind: str, dims: Mapping[str, int]) -> Bucket:
        """The one bucket of a step of these sizes (other symbols are ignored).

        Raises:
            CapacityError: a size exceeds the plan's limit, so the step is beyond what the engine was configured for.
        """
        return Bucket(kind, tuple([(symbol, _rung(kind, symbol, rungs, dims[symbol]))
                                   for symbol, rungs in self.kinds[kind].items()]))

    def seconds(self, each: float) -> float:
        """The seconds to compile all programs when one takes `each` seconds."""
        return len(self) * each


def _rung(kind: str, symbol: str, rungs: tuple[int, ...], size: int) -> int:
    if size <= rungs[-1]:
        return rungs[bisect_left(rungs, size)]
    raise CapacityError(f"a {kind} step is larger than every shape that was prepared", got=f"{symbol}={size}",
                        expected=f"at most {rungs[-1]}", hint="schedule within the engine's max_num_seqs, "
                        "max_num_batched_tokens and max_model_len")


def ladder(limit: int, factor: float, first: int = 1) -> tuple[int, ...]:
    """first, first * factor, ... and the limit: padding wastes less than factor - 1 of a size above `first`."""
    rungs = []
    size = float(first)
    while size < limit:
        rungs.append(int(size))
        size *= factor
    return (*rungs, limit)


def finest(candidates: Iterable[ShapePlan], each: float, budget: float) -> ShapePlan:
    """The first of `candidates` (finest first) that compiles within `budget` seconds, else the last."""
    for plan in candidates:
        if plan.seconds(each) <= budget:
            break
    return plan
