"""A decode step of tensor-parallel ranks with one thread each beside one process with as many threads, in turns.

    python benchmarks/cpu_ranks.py [--other TREE] [--repeat N] [--batches 1,8] [--new N]

Random weights of the Qwen2-0.5B shape in bfloat16, prompts of 64. `--other` measures the ranks of another checkout of
this library too. Each side is a process of its own that lives for the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT = 64


def serve(tp: int) -> None:
    """Answer each line (batch, new tokens) with the seconds of a decode step."""
    from hal.cli import measure
    from hal.cli.shapes import SHAPES
    from hal.engine.llm import LLM

    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(SHAPES["qwen2-0.5b"]), encoding="utf-8")
        with LLM(scratch, random_weights=True, device="cpu", dtype="bfloat16", tp=tp, max_num_seqs=8,
                 max_model_len=256, num_blocks=200) as llm:
            print("ready", flush=True)
            for line in sys.stdin:
                batch, new = map(int, line.split())
                prompts = [[(7 * i + j) % 1000 + 5 for j in range(PROMPT)] for i in range(batch)]
                print(measure.time_prompts(llm, prompts, new).decode_step, flush=True)


def start(tree: str, tp: int, threads: int) -> Any:
    environment = os.environ | {"PYTHONPATH": tree, "OMP_NUM_THREADS": str(threads // tp)}
    side = subprocess.Popen([sys.executable, __file__, "--serve", str(tp)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=environment)
    assert side.stdout is not None and side.stdout.readline() == "ready\n"
    return side


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=int)
    parser.add_argument("--other")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--new", type=int, default=24)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    here = str(Path(__file__).parents[1])
    sides = {"one process": start(here, 1, args.tp), f"tp {args.tp}": start(here, args.tp, args.tp)}
    if args.other:
        sides[f"tp {args.tp} of {args.other}"] = start(args.other, args.tp, args.tp)
    for batch in map(int, args.batches.split(",")):
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.repeat + 1):
            for name, side in sides.items():
                side.stdin.write(f"{batch} {args.new}\n")
                side.stdin.flush()
                took = 1e3 * float(side.stdout.readline())
                if turn:  # the first warms up
                    times[name].append(took)
        first = statistics.median(times["one process"])
        for name, found in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["one process"], found, strict=True))
            print(f"batch {batch}, {name}: {statistics.median(found):.2f} ms ({min(found):.2f} to {max(found):.2f}), "
                  f"{first / statistics.median(found):.3f} of one process's rate (median of rounds {ratio:.3f})",
                  flush=True)
    for side in sides.values():
        side.stdin.close()
        side.wait(30)


if __name__ == "__main__":
    main()
