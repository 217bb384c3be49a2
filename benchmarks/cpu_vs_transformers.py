"""Decode speed of the CPU runner beside transformers' `generate` (SDPA, KV cache), interleaved in one process.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/cpu_vs_transformers.py [--dtype float32] [--rounds 3]

A 0.5B shape with random weights. Both decode greedily after equal prompts; the first token (prefill) is timed apart.
The runner is driven as a worker drives it: requests with block ids in, tokens out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from hal.communicator import LocalCommunicator
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.models.config import ModelConfig, RopeConfig
from hal.request import ExecuteModelRequest
from runners.cpu import backend

BLOCK = 16
SHAPE = ModelConfig(family="llama", architecture="Qwen2ForCausalLM", vocab_size=151936, hidden_size=896, num_layers=24,
                    num_heads=14, num_kv_heads=2, head_dim=64, intermediate_size=4864, max_position=4096,
                    rope=RopeConfig(theta=1e6), tie_embeddings=True, qkv_bias=True)
Times = tuple[float, float]  # seconds to the first token; seconds a step after it


class Runner:
    """The runner with a scheduler for one fixed batch: all prompts at once, then a token of each in every step."""

    def __init__(self, dtype: str, batch: int, length: int) -> None:
        engine = EngineConfig(random_weights=True, dtype=dtype, max_num_seqs=batch, max_model_len=length)  # type: ignore[arg-type]
        self.runner = backend.make_runner(WorkerConfig(engine, SHAPE, Topology()), backend.device(0),
                                          LocalCommunicator())
        self.runner.load_model()
        self.blocks = -(-length // BLOCK)
        self.caches = self.runner.make_kv_caches(1 + batch * self.blocks)
        self.epoch = 0

    def generate(self, prompts: np.ndarray, count: int) -> Times:
        batch, length = prompts.shape
        self.epoch += 1
        none, rows = np.zeros(0, np.int32), np.arange(batch, dtype=np.int32)
        same = {"epoch": self.epoch, "finished_rows": none, "rows": rows}
        nothing = dict.fromkeys(("new_rows", "new_lens", "new_prompt_lens", "new_tokens", "block_rows", "block_starts",
                                 "block_counts", "new_blocks"), none)
        floats, ints = np.array([[0, 1, 0, 1, 0, 0]], np.float32), np.array([[0, 0, -1, -1]], np.int64)
        full = np.full(batch, length, np.int32)
        request = ExecuteModelRequest(
            **same, step=0, new_rows=rows, new_lens=full, new_prompt_lens=full, new_tokens=prompts.ravel(),
            new_floats=floats.repeat(batch, 0), new_ints=ints.repeat(batch, 0), append_rows=none, append_tokens=none,
            block_rows=rows, block_starts=rows * 0, block_counts=rows * 0 + self.blocks,
            new_blocks=np.arange(1, 1 + batch * self.blocks, dtype=np.int32), num_scheduled=full, num_computed=rows * 0)
        start = time.perf_counter()
        stamps = []
        for step in range(count):
            output: Any = self.runner.execute_model(self.runner.prepare_model_input(request), self.caches)
            tokens = output.token_ids.numpy()
            stamps.append(time.perf_counter())
            request = ExecuteModelRequest(
                **same, **nothing, step=step + 1, digest=request.chain(), new_floats=floats[:0], new_ints=ints[:0],
                append_rows=rows, append_tokens=tokens, num_scheduled=rows * 0 + 1,
                num_computed=rows * 0 + length + step)
        return stamps[0] - start, (stamps[-1] - stamps[0]) / (count - 1)


class Transformers:
    def __init__(self, dtype: str) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        c = SHAPE
        config = Qwen2Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, intermediate_size=c.intermediate_size,
            max_position_embeddings=c.max_position, tie_word_embeddings=True, attn_implementation="sdpa")
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        self.model = Qwen2ForCausalLM(config).eval()
        torch.set_default_dtype(before)

    def generate(self, prompts: np.ndarray, count: int) -> Times:
        from transformers import StoppingCriteriaList

        stamps: list[float] = []

        def stamp(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.from_numpy(prompts).long()
        start = time.perf_counter()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                            do_sample=False, use_cache=True, pad_token_id=0,
                            stopping_criteria=StoppingCriteriaList([stamp]))
        return stamps[0] - start, (stamps[-1] - stamps[0]) / (count - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, prompt {args.prompt}, "
          f"{args.new} new tokens; medians of {args.rounds} interleaved rounds")
    print("batch | decode tokens/s: transformers, ours, ratio (lowest, highest) | first token s: transformers, ours")
    theirs = Transformers(args.dtype)
    for batch in args.batches:
        ours = Runner(args.dtype, batch, args.prompt + args.new)
        prompts = rng.integers(0, SHAPE.vocab_size, (batch, args.prompt)).astype(np.int32)
        for system in (theirs, ours):
            system.generate(prompts, 2)
        pairs = [(theirs.generate(prompts, args.new), ours.generate(prompts, args.new)) for _ in range(args.rounds)]
        ratios = sorted(a[1] / b[1] for a, b in pairs)
        first, step = ([statistics.median(pair[i][which] for pair in pairs) for i in (0, 1)] for which in (0, 1))
        print(f"{batch:>5} | {batch / step[0]:8.1f} {batch / step[1]:8.1f} {statistics.median(ratios):6.2f} "
              f"({ratios[0]:.2f}, {ratios[-1]:.2f}) | {first[0]:7.2f} {first[1]:7.2f}", flush=True)


if __name__ == "__main__":
    main()
