"""The driver's time for a decode step, without the model: schedule, prepare, wire, update, outputs.

    python benchmarks/step.py [--tp N] [--steps K] [--repeat N] [sequences ...]

With --steps K ranks take K decode steps for one message, and figures are of a message; the line of a number of
sequences also says what that is a token.

The null backend's own arithmetic (`execute_model` of its runner) is subtracted, and what advances its inputs within a
message with it; what is left is this library's. With
--tp the other ranks are processes, and the wait for them in a reduction is within what is subtracted. Each part is
timed where it is called, and named as it nests: "prepare" holds "apply", "pack" and "validate". Prompts differ in
length, so that in each step one sequence in sixteen fills a block, which is hashed for the prefix cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

from hal import LLM, SamplingParams
from hal.testing.null import NullRunner

STEPS, WARM, PROMPT = 300, 40, 96
spent: defaultdict[str, float] = defaultdict(float)


def timed(owner: Any, name: str, label: str) -> None:
    """Add what `owner.name` takes to `spent[label]`."""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[label] += perf_counter() - start

    setattr(owner, name, wrapper)


def measure(sequences: int, tp: int, steps: int, parts: bool) -> dict[str, float]:
    """Median microseconds of a message, whole ("driver") and by part."""
    spent.clear()
    tokens = STEPS + WARM + 2  # the bundled model's context holds no more
    warm, messages = -(-WARM // steps), (tokens - 2) // steps
    with LLM(device="null", tp=tp, max_num_seqs=sequences, max_num_batched_tokens=max(sequences * PROMPT, 2048),
             max_model_len=PROMPT + tokens, num_blocks=sequences * (-(-(PROMPT + tokens) // 16) + 1) + 1,
             prefix_caching=True, steps_per_message=steps) as llm:
        worker = llm.executor._worker  # type: ignore[attr-defined]
        timed(worker.runner, "execute_model", "execute")
        if parts:
            for owner, name, label in (
                    (llm.scheduler, "schedule", "schedule"), (worker, "prepare", "prepare"),
                    (worker.runner.state, "apply", "  apply"), (worker.runner.state, "prepare", "  pack"),
                    (worker, "_checked", "  validate"), (worker.plane, "broadcast", "broadcast"),
                    (llm.executor, "execute_model", "executor, all"), (llm.scheduler, "update", "update"),
                    (llm, "_take_over", "take over, all")):
                timed(owner, name, label)
        for i in range(sequences):
            llm.add_request([1 + i % 11] * (PROMPT - i % 16), SamplingParams(max_tokens=tokens, ignore_eos=True))
        while llm.scheduler.waiting:
            llm.step(text=False)
        found: defaultdict[str, list[float]] = defaultdict(list)
        for n in range(messages):
            spent.clear()
            start = perf_counter()
            llm.step(text=False)
            whole = perf_counter() - start
            if n >= warm:
                found["driver"].append(whole - spent.pop("execute", 0.0))
                for label, seconds in spent.items():
                    found[label].append(seconds)
        assert isinstance(worker.runner, NullRunner)
    return {label: 1e6 * statistics.median(values) for label, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sequences", nargs="*", type=int, default=[1, 256, 1024])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    for sequences in args.sequences:
        runs = sorted(measure(sequences, args.tp, args.steps, parts=False)["driver"] for _ in range(args.repeat))
        median = runs[len(runs) // 2]
        print(f"tp{args.tp}, {sequences} sequences, {args.steps} steps a message: median {median:.0f} us, "
              f"{median / args.steps:.0f} a token ({', '.join(f'{r:.0f}' for r in runs)})", flush=True)
        for label, us in measure(sequences, args.tp, args.steps, parts=True).items():
            print(f"    {label:<16}{us:8.1f}")


if __name__ == "__main__":
    main()
