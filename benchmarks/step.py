"""The driver's time for a decode step, without the model: schedule, prepare, wire, update, outputs.

    python benchmarks/step.py [--tp N] [--steps K] [--text] [--repeat N] [sequences ...]

With --steps K a second engine takes K decode steps for each message. The two take turns in one process, K messages of
the first and one of the second, so both meet the same noise, and the ratio of their times for a token is printed.

Times are of the CPU of the driver's thread, so neither another process nor a wait for one counts. The null backend's
own arithmetic (`execute_model` of its runner) is subtracted, and what advances its inputs within a
message with it: what is left is this library's. With --tp the other ranks are processes, and the wait for them in a
reduction is no CPU time. Each part is timed where it is called, and named as it nests: "prepare" holds
"apply", "pack" and "validate". Prompts differ in length, so that in each step one sequence in sixteen fills a block,
which is hashed for the prefix cache. Texts are left out, unless --text asks for them.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from time import thread_time
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

from hal import LLM, SamplingParams
from hal.testing.null import NullRunner

STEPS, WARM, PROMPT = 300, 40, 96


class Engine:
    """An engine whose sequences all decode, and what its messages cost.

    Attributes:
        spent: seconds of the message that runs, by part. found: those of each message, whole ("driver") and by part.
    """

    def __init__(self, sequences: int, tp: int, steps: int, *, parts: bool, text: bool) -> None:
        self.steps, self.text = steps, text
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.found: defaultdict[str, list[float]] = defaultdict(list)
        tokens = STEPS + WARM + 2  # the bundled model's context holds no more
        self.llm = llm = LLM(device="null", tp=tp, max_num_seqs=sequences,
                             max_num_batched_tokens=max(sequences * PROMPT, 2048), max_model_len=PROMPT + tokens,
                             num_blocks=sequences * (-(-(PROMPT + tokens) // 16) + 1) + 1, prefix_caching=True,
                             steps_per_message=steps)
        worker = llm.executor._worker  # type: ignore[attr-defined]
        assert isinstance(worker.runner, NullRunner)
        self.timed(worker.runner, "execute_model", "execute")
        if parts:
            for owner, name, label in (
                    (llm.scheduler, "schedule", "schedule"), (worker, "prepare", "prepare"),
                    (worker.runner.state, "apply", "  apply"), (worker.runner.state, "prepare", "  pack"),
                    (worker, "_checked", "  validate"), (worker.plane, "broadcast", "broadcast"),
                    (llm.executor, "execute_model", "executor, all"), (llm.scheduler, "update", "update"),
                    (llm.core, "take_over", "take over, all")):
                self.timed(owner, name, label)
        for i in range(sequences):
            llm.add_request([1 + i % 11] * (PROMPT - i % 16), SamplingParams(max_tokens=tokens, ignore_eos=True))
        while llm.scheduler.waiting:
            llm.step(text=text)

    def timed(self, owner: Any, name: str, label: str) -> None:
        """Add what `owner.name` takes to `spent[label]`."""
        function: Callable[..., Any] = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[label] += thread_time() - start

        setattr(owner, name, wrapper)

    def message(self, *, keep: bool) -> None:
        self.spent.clear()
        start = thread_time()
        self.llm.step(text=self.text)
        whole, execute = thread_time() - start, self.spent.pop("execute", 0.0)
        if keep:
            for label, seconds in {"driver": whole - execute, **self.spent}.items():
                self.found[label].append(seconds)

    def medians(self) -> dict[str, float]:
        """Microseconds of a message."""
        return {label: 1e6 * statistics.median(values) for label, values in self.found.items()}


def measure(sequences: int, tp: int, kinds: list[int], *, parts: bool, text: bool) -> list[dict[str, float]]:
    """Median microseconds of a message, whole ("driver") and by part, of an engine of each number of steps."""
    longest = max(kinds)
    with ExitStack() as stack:
        engines = [Engine(sequences, tp, steps, parts=parts, text=text) for steps in kinds]
        for engine in engines:
            stack.enter_context(engine.llm)
        for n in range(STEPS // longest + WARM // longest):
            for engine in engines:
                for _ in range(longest // engine.steps):
                    engine.message(keep=n >= WARM // longest)
        return [engine.medians() for engine in engines]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sequences", nargs="*", type=int, default=[1, 256, 1024])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    kinds = sorted({1, args.steps})
    for sequences in args.sequences:
        runs = [[found["driver"] / steps for steps, found in zip(kinds, measure(
            sequences, args.tp, kinds, parts=False, text=args.text), strict=True)] for _ in range(args.repeat)]
        for steps, of_runs in zip(kinds, zip(*runs, strict=True), strict=True):
            runs_us = ", ".join(f"{r:.0f}" for r in of_runs)
            print(f"tp{args.tp}, {sequences} sequences, {steps} steps a message: "
                  f"median {statistics.median(of_runs):.0f} us a token of each ({runs_us})", flush=True)
        if len(kinds) > 1:
            ratios = [run[0] / run[-1] for run in runs]
            print(f"    one step a message takes {statistics.median(ratios):.2f} times as long a token as {kinds[-1]} "
                  f"({', '.join(f'{r:.2f}' for r in ratios)})")
        parts = measure(sequences, args.tp, kinds, parts=True, text=args.text)
        for label in parts[0]:
            print(f"    {label:<16}" + "".join(f"{found[label]:10.1f}" for found in parts))


if __name__ == "__main__":
    main()
