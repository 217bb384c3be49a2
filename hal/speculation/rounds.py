"""The time that a round of speculative decoding takes, measured on the rank's own device before the first request."""

from __future__ import annotations

import math
import time
from typing import Any

_TIMES = 3  # of which the fastest counts; the first may still compile and allocate


def measured_rounds(runner: Any, kv_caches: Any) -> list[tuple[int, int, float]]:
    """Sequences, drafts of each, and the seconds of a round that verifies and proposes so many: of the sizes that the
    runner names in `rounds`. A round without drafts is a plain step of this engine. The contexts are empty, and the
    scheduler's time is not in it. All tensor-parallel ranks call this together."""
    found = []
    for num_seqs, drafts in runner.rounds:
        least = math.inf
        for _ in range(_TIMES):
            begin = time.perf_counter()
            output = runner.execute_model(runner.dummy_round(num_seqs, drafts), kv_caches)
            if output is not None:
                fetched = runner.fetch(output)()
                _ = fetched.draft_tokens  # which may arrive later than the rest, and reading waits for them
            least = min(least, time.perf_counter() - begin)
        found.append((num_seqs, drafts, least))
    return found
