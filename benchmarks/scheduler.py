"""What the scheduler costs a steady decode step: `python benchmarks/scheduler.py [sequences]`. No model, no torch."""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from hal.config import EngineConfig
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.sampling.params import SamplingParams


def main(num_seqs: int = 256, steps: int = 800) -> None:
    config = EngineConfig(max_num_seqs=num_seqs, max_num_batched_tokens=8192)
    scheduler = Scheduler(config, num_seqs * 128, eos_token_ids=(2,))
    rng = np.random.default_rng(0)
    for i in range(num_seqs):
        prompt = rng.integers(3, 1000, int(rng.integers(1, 64))).tolist()
        scheduler.add(Sequence(request_id=i, prompt_ids=prompt, params=SamplingParams(), seed=i, limit=2000))
    times: dict[str, list[float]] = {"schedule": [], "update": [], "both": []}
    for n in range(steps + 20):
        t0 = time.perf_counter()
        step = scheduler.schedule()
        t1 = time.perf_counter()
        assert step is not None
        tokens = rng.integers(3, 1000, len(step.sampled)).astype(np.int32)
        t2 = time.perf_counter()
        scheduler.update(step, tokens)
        t3 = time.perf_counter()
        if n >= 20:
            for name, spent in (("schedule", t1 - t0), ("update", t3 - t2), ("both", t1 - t0 + t3 - t2)):
                times[name].append(spent * 1e6)
    for name, values in times.items():
        p90 = statistics.quantiles(values, n=10)[-1]
        print(f"{num_seqs} sequences, {name}: median {statistics.median(values):.0f} us, p90 {p90:.0f} us")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
