"""The Transformers backend beside the native definition of one shape, random weights, interleaved in one process.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/impl.py [--device cpu] [--repeat 3]

A step's time is the mean between two tokens while the whole batch decodes; the table has medians of the repeats.
`python benchmarks/gpu.py impl` measures the same on a GPU, with its graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from hal.cli.measure import time_batch
from hal.cli.shapes import SHAPES
from hal.engine.llm import LLM

SHAPE, BATCHES, PROMPT = "qwen2-0.5b", (1, 32), 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    longest, steps = PROMPT + args.tokens, dict[tuple[str, int], list[float]]()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(SHAPES[SHAPE]))
        engines = {impl: LLM(scratch, device=args.device, dtype=args.dtype, model_impl=impl, random_weights=True,
                             max_num_seqs=max(BATCHES), max_model_len=longest, prefix_caching=False,
                             num_blocks=1 + max(BATCHES) * -(-longest // 16)) for impl in ("native", "transformers")}
        for repeat in range(args.repeat + 1):  # the first warms up
            for batch in BATCHES:
                for impl, llm in engines.items():
                    run = time_batch(llm, llm.model_config.vocab_size, batch, PROMPT, args.tokens)
                    if repeat:
                        steps.setdefault((impl, batch), []).append(run.decode_step)
        for llm in engines.values():
            llm.shutdown()
    print(f"{SHAPE} shape, {args.dtype}, {args.device}, prompt {PROMPT}, {args.tokens} new tokens, "
          f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, medians of {args.repeat}\n")
    print("| batch | native, ms a step | Transformers backend | its rate, of native |\n| --- | --- | --- | --- |")
    for batch in BATCHES:
        native, other = (statistics.median(steps[impl, batch]) * 1e3 for impl in ("native", "transformers"))
        print(f"| {batch} | {native:.1f} | {other:.1f} | {native / other:.2f} |")


if __name__ == "__main__":
    main()
