"""Decode speed of pipeline stages and tensor-parallel ranks beside one process, one model, interleaved.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/overlap.py [--repeat N] [--batch N]

Two stages with a thread each stand beside one process with one thread; two tensor-parallel ranks with one each
beside one process with two. Random weights, float32; the batch is large enough that arithmetic counts and not only
reading weights, and half of it is on its way in each virtual engine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

SHAPE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "intermediate_size": 2048, "vocab_size": 8192, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None}
PROMPT = 32


def decode_rate(llm: LLM, batch: int, tokens: int) -> float:
    """Tokens a second while the whole batch decodes."""
    draw = random.Random(batch)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for _ in range(batch):
        llm.add_request([draw.randrange(SHAPE["vocab_size"]) for _ in range(PROMPT)], params)
    lengths: dict[int, int] = {}
    start, done, counted = 0.0, 0, 0
    while llm.unfinished:
        outputs = llm.step()
        if start and not done:
            counted += len(outputs)
        for output in outputs:
            lengths[output.request_id] = len(output.token_ids)
            if output.finish_reason is not None and not done:
                done, end = 1, time.perf_counter()
        if not start and len(lengths) == batch and min(lengths.values()) >= 2:
            start = time.perf_counter()
    return counted / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(SHAPE))
        options = {"random_weights": True, "device": "cpu", "num_blocks": 512, "prefix_caching": False}
        # Each virtual engine takes half of the batch at a time.
        with LLM(scratch, max_num_seqs=args.batch, **options) as one, \
                LLM(scratch, max_num_seqs=args.batch, pp=2, **options) as pp2, \
                LLM(scratch, max_num_seqs=args.batch, tp=2, **options) as tp2:
            runs = {"one process, 1 thread": (one, 1), "pp2, 1 thread each": (pp2, 1),
                    "one process, 2 threads": (one, 2), "tp2, 1 thread each": (tp2, 1)}
            for repeat in range(args.repeat + 1):
                for name, (llm, threads) in runs.items():
                    torch.set_num_threads(threads)
                    rate = decode_rate(llm, args.batch, args.tokens)
                    if repeat:
                        rates.setdefault(name, []).append(rate)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"batch {args.batch}, {args.tokens} new tokens, medians of {args.repeat}")
    for name, rate in middle.items():
        print(f"{name:24} {rate:8.1f} tokens/s")
    print(f"pp2 / one process with one thread: {middle['pp2, 1 thread each'] / middle['one process, 1 thread']:.2f}")
    print(f"tp2 / one process with two threads: {middle['tp2, 1 thread each'] / middle['one process, 2 threads']:.2f}")


if __name__ == "__main__":
    main()
