"""XLA's CPU client beside the CPU runner: what a decode step costs, updating caches of two sizes, and starting again.

    PJRT_DEVICE=CPU python benchmarks/xla.py step|cache|start [--dtype float32]

One core. `step` and `cache` interleave what they compare, in one process; `start` runs processes one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XLA's own threads heed nothing else

import torch

from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts import backend as backends
from hal.contracts.communicator import LocalCommunicator
from hal.model_config import ModelConfig, RopeConfig

BLOCK, LENGTH = 16, 256


def shape(layers: int, hidden: int) -> ModelConfig:
    return ModelConfig(family="llama", architecture="LlamaForCausalLM", vocab_size=32000, hidden_size=hidden,
                       num_layers=layers, num_heads=hidden // 64, num_kv_heads=max(hidden // 256, 1), head_dim=64,
                       intermediate_size=hidden * 4, max_position=LENGTH, rope=RopeConfig())


def make(device: str, dtype: str, model: ModelConfig, batch: int) -> Any:
    engine = EngineConfig(random_weights=True, dtype=dtype, max_num_seqs=batch, max_num_batched_tokens=batch,  # type: ignore[arg-type]
                          block_size=BLOCK, async_scheduling=False)
    backend = backends.load(device)
    runner = backend.make_runner(WorkerConfig(engine, model, Topology()), backend.device(0), LocalCommunicator())
    runner.load_model()
    return runner


def decoding(runner: Any, caches: Any, batch: int, context: int) -> Callable[[], torch.Tensor]:
    """A decode step of `batch` sequences with `context` tokens, from a packed host input to token ids on the host."""
    blocks = -(-context // BLOCK)
    packed = runner.input_type.schema.allocate(
        {"num_tokens": batch, "num_seqs": batch, "max_blocks": blocks, "num_logits": batch}, block_size=BLOCK,
        num_decode_seqs=batch, num_samples=batch)
    tables = torch.arange(1, 1 + batch * blocks).view(batch, blocks)
    for name, value in (("input_ids", torch.arange(batch)), ("positions", context - 1), ("seq_lens", context),
                        ("slot_mapping", tables[:, (context - 1) // BLOCK] * BLOCK + (context - 1) % BLOCK),
                        ("block_tables", tables), ("query_start_loc", torch.arange(batch + 1)),
                        ("logits_indices", torch.arange(batch))):
        packed.arrays[name][...] = value
    return lambda: runner.execute_model(packed.to(), caches).token_ids


def alternate(steps: list[Callable[[], torch.Tensor]], rounds: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        for _ in range(5):
            step()
    for _ in range(rounds):
        for of_step, step in zip(times, steps, strict=True):
            start = time.perf_counter()
            step()
            of_step.append(time.perf_counter() - start)
    return times


def measure_step(dtype: str, rounds: int) -> None:
    print("| layers x hidden | batch | CPU runner ms | XLA ms | ratio of medians | p10, p90 of pairs |")
    for layers, hidden in ((4, 512), (8, 1024)):
        for batch in (1, 4, 16):
            model, steps = shape(layers, hidden), []
            for device in ("runners.cpu:backend", "runners.tpu:backend"):
                runner = make(device, dtype, model, batch)
                caches = runner.make_kv_caches(1 + batch * LENGTH // BLOCK)
                runner.warmup(caches)
                steps.append(decoding(runner, caches, batch, LENGTH))
            cpu, xla = alternate(steps, rounds)
            pairs = statistics.quantiles([x / c for c, x in zip(cpu, xla, strict=True)], n=10)
            c, x = statistics.median(cpu), statistics.median(xla)
            print(f"| {layers} x {hidden} | {batch} | {c * 1e3:.2f} | {x * 1e3:.2f} | {x / c:.2f} | {pairs[0]:.2f}, "
                  f"{pairs[-1]:.2f} |", flush=True)


def measure_cache(dtype: str, rounds: int) -> None:
    model, steps, sizes = shape(4, 512), [], (128 << 20, 1 << 30)
    runner = make("runners.tpu:backend", dtype, model, 4)
    for size in sizes:
        caches = runner.make_kv_caches(size // runner.kv_bytes_per_block())
        runner.warmup(caches)
        steps.append((dict(runner.programs), decoding(runner, caches, 4, LENGTH)))

    def call(programs: Any, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        runner.programs = programs
        return step()

    small, large = alternate([lambda p=p, s=s: call(p, s) for p, s in steps], rounds)  # type: ignore[misc]
    a, b = statistics.median(small), statistics.median(large)
    print(f"decode step with caches of 128 MB {a * 1e3:.3f} ms, of 1 GB {b * 1e3:.3f} ms: ratio {b / a:.2f}")


def measure_start(dtype: str) -> None:
    print("| start | seconds to load and warm up | compiled | of these read from the cache |")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XLA_PERSISTENT_CACHE_PATH": folder}
        for number in (1, 2):
            out = subprocess.run([sys.executable, __file__, "once", "--dtype", dtype], env=environment, text=True,
                                 capture_output=True, check=True).stdout
            found = json.loads(out.splitlines()[-1])
            print(f"| {number} | {found['seconds']:.1f} | {found['compiled']} | {found['hits']} |", flush=True)


def start_once(dtype: str) -> None:
    from runners.tpu import lowering

    begin = time.perf_counter()
    runner = make("runners.tpu:backend", dtype, shape(4, 512), 4)
    runner.warmup(runner.make_kv_caches(100))
    print(json.dumps({"seconds": time.perf_counter() - begin, "compiled": lowering.compiles(),
                      "hits": lowering.cache_hits()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "cache", "start", "once"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    if args.what == "once":
        return start_once(args.dtype)
    print(f"torch {torch.__version__}, one core, {args.dtype}, context {LENGTH}, vocabulary 32000")
    if args.what == "start":
        measure_start(args.dtype)
    else:
        {"step": measure_step, "cache": measure_cache}[args.what](args.dtype, args.rounds)


if __name__ == "__main__":
    main()
