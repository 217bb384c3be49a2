"""The CUDA runner's figures: `python benchmarks/gpu.py [sections] [--json FILE]`, all sections by default.

A step's floor is the time that reading its weights and KV cache takes at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hal.checkpoints.hf_config import read_config
from hal.cli.measure import random_prompts, time_batch, time_prompts
from hal.cli.shapes import SHAPES
from hal.engine.llm import LLM
from hal.models.floors import bytes_per_step
from hal.models.memory import EXPERTS, weight_bytes
from hal.sampling.params import SamplingParams

RESULTS: dict[str, Any] = {}
PROFILE = False


def graphed(call: Callable[[], object]) -> float:
    """Milliseconds of a call inside a graph of several, without what launching costs the host."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            call()
    return milliseconds(graph.replay) / 4


def milliseconds(call: Callable[[], object], rounds: int = 30) -> float:
    for _ in range(5):
        call()
    spent = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return statistics.median(spent)


def copy_bandwidth() -> float:
    """Bytes/s, read and written."""
    x = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x), 10) * 1e3


def attention(bandwidth: float) -> None:
    from hal.contracts.attention import AttentionSpec
    from runners.cuda.attention import CudaAttention
    from runners.cuda.kernels import attention as kernels

    spec, device, dtype = AttentionSpec(32, 8, 128, 128 ** -0.5), torch.device("cuda"), torch.bfloat16
    maker = CudaAttention([spec], device=device, dtype=dtype)
    for seqs, context, size in ((64, 2048, 16), (1, 2048, 16), (32, 1088, 16), (128, 1088, 16)):
        blocks = context // size
        cache = torch.randn(maker.cache_shape(spec, seqs * blocks + 1, size), device=device).to(dtype)
        tables = (torch.randperm(seqs * blocks, device=device) + 1).int().view(seqs, blocks)
        lens = torch.full((seqs,), context, dtype=torch.int32, device=device)
        q = torch.randn(seqs, 32, 128, device=device).to(dtype)
        out = torch.empty_like(q)
        how = maker.divided(seqs, context, spec.num_kv_heads)
        ms = graphed(lambda: kernels.decode(q, cache, tables, lens, out, scale=spec.scale, window=None,  # noqa: B023
                                            how=how))  # noqa: B023
        rate = seqs * context * 2 * 8 * 128 * 2 / ms * 1e3
        print(f"decode attention {seqs:>4} x {context}: {ms * 1e3:8.1f} us, {rate / 1e12:.2f} TB/s, "
              f"{rate / bandwidth:.2f} of copy ({how})", flush=True)
        RESULTS[f"attention_decode_{seqs}x{context}"] = rate / bandwidth
    seqs, length, size = 8, 2048, 16
    cache = torch.randn(maker.cache_shape(spec, seqs * length // size + 1, size), device=device).to(dtype)
    tables = (torch.randperm(seqs * length // size, device=device) + 1).int().view(seqs, -1)
    lens = torch.full((seqs,), length, dtype=torch.int32, device=device)
    starts = torch.arange(seqs + 1, device=device, dtype=torch.int32) * length
    q = torch.randn(seqs * length, 32, 128, device=device).to(dtype)
    out = torch.empty_like(q)
    ours = milliseconds(lambda: kernels.prefill(q, cache, tables, lens, starts, out, first_seq=0, max_queries=length,
                                                scale=spec.scale, window=None))
    qs = q.view(seqs, length, 32, 128).transpose(1, 2)
    k, v = (torch.randn(seqs, 8, length, 128, device=device).to(dtype) for _ in range(2))
    k, v = (x.repeat_interleave(4, 1) for x in (k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        flash = milliseconds(lambda: F.scaled_dot_product_attention(qs, k, v, is_causal=True))
    print(f"prefill attention 8 x 2048: {ours:.2f} ms, torch's flash SDPA {flash:.2f} ms, ratio {flash / ours:.2f}")
    RESULTS["attention_prefill_vs_flash"] = flash / ours


def prefill() -> None:
    """Prompts by length: a layer's attention of the 8B shape beside the fastest of PyTorch's, whose keys are contiguous
    and repeated for every head, and the whole model beside a product of matrices of 8,192 x 8,192."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from hal.contracts.attention import AttentionSpec
    from runners.cuda.attention import CudaAttention
    from runners.cuda.kernels import attention as kernels

    lengths, device, dtype, size = (512, 1024, 2048, 4096, 8192), torch.device("cuda"), torch.bfloat16, 16
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    peak = 2 * 8192 ** 3 / milliseconds(lambda: a @ b) * 1e3
    print(f"product of 8,192-cubes: {peak / 1e12:.0f} TFLOP/s", flush=True)
    RESULTS["product_8192"] = peak
    maker = CudaAttention([AttentionSpec(32, 8, 128, 128 ** -0.5)], device=device, dtype=dtype)
    for length in lengths:
        seqs = 8192 // length
        cache = torch.randn(maker.cache_shape(maker.specs[0], 8192 // size + 1, size), device=device).to(dtype)
        tables = (torch.randperm(8192 // size, device=device) + 1).int().view(seqs, -1)
        lens = torch.full((seqs,), length, dtype=torch.int32, device=device)
        starts = torch.arange(seqs + 1, device=device, dtype=torch.int32) * length
        q = torch.randn(8192, 32, 128, device=device).to(dtype)
        out = torch.empty_like(q)
        ours = milliseconds(lambda: kernels.prefill(q, cache, tables, lens, starts, out, first_seq=0,  # noqa: B023
                                                    max_queries=length, scale=128 ** -0.5, window=None))  # noqa: B023
        qs = q.view(seqs, length, 32, 128).transpose(1, 2)
        k, v = (torch.randn(seqs, 32, length, 128, device=device).to(dtype) for _ in range(2))
        others = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            with sdpa_kernel(backend):
                others[backend.name] = milliseconds(
                    lambda: F.scaled_dot_product_attention(qs, k, v, is_causal=True))  # noqa: B023
        best = min(others, key=lambda name: others[name])
        operations = 2 * seqs * length ** 2 * 32 * 128  # half of the scores
        print(f"attention {seqs:>2} x {length:>5}: {ours:.3f} ms, {operations / ours / 1e9:.0f} TFLOP/s; {best} "
              f"{others[best]:.3f} ms, ratio {others[best] / ours:.2f}", flush=True)
        RESULTS[f"attention_prefill_{length}"] = {"ms": ours, "best": best, "ratio": others[best] / ours}
    s = SHAPES["llama-3-8b"]
    hidden, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    weights = layers * hidden * (2 * hidden + 2 * 1024 + 3 * inner)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(s))
        with LLM(scratch, device="cuda", random_weights=True, max_num_seqs=1, max_num_batched_tokens=8192,
                 max_model_len=8192 - 8, prefix_caching=False) as llm:
            for length in (*lengths[:-1], 8192 - 16):
                time_batch(llm, s["vocab_size"], 1, length, 3)
                spent = statistics.median(time_batch(llm, s["vocab_size"], 1, length, 3).prefill for _ in range(7))
                operations = 2 * weights * length + 2 * layers * length ** 2 * hidden + 2 * s["vocab_size"] * hidden
                print(f"8B, prompt of {length:>5}: {spent * 1e3:7.1f} ms to the first token, "
                      f"{operations / spent / 1e12:.0f} TFLOP/s, {operations / spent / peak:.2f} of the product",
                      flush=True)
                RESULTS[f"prefill_{length}"] = {"ms": spent * 1e3, "of_product": operations / spent / peak}


def few_bits(bandwidth: float) -> None:
    """Products of few rows with each form of weight, in each tile, beside PyTorch's product in bfloat16."""
    from hal.weights.configs import ON_LOAD
    from runners.cuda.kernels.few_bits import few_bits as packed
    from runners.cuda.kernels.few_bits import multiply, one_row
    from runners.cuda.kernels.gemv import Tile

    for out, size in ((28672, 4096), (4096, 14336), (6144, 4096)):
        dense = torch.randn(out, size, device="cuda").mul_(0.02).bfloat16()
        for name, scheme in ON_LOAD.items():
            weight = packed(grid_of(scheme, dense))
            assert weight is not None
            moved = sum(x.nbytes for x in (weight.values, weight.scales, weight.zeros) if x is not None)
            for rows in (1, 2, 16):
                x = torch.randn(rows, size, device="cuda").bfloat16()
                plain = graphed(lambda: F.linear(x, dense))  # noqa: B023
                spent = {}
                tiles = ((4, 8, 16), (8, 16, 32), (1, 4, 8)) if rows == 1 else ((64, 128), (1, 2, 5, 8, 16), (4, 8))
                for tile in itertools.product(*tiles):
                    how = dict(zip(("rows", "splits", "warps"), tile, strict=True))
                    try:
                        spent[tile] = graphed(
                            (lambda: one_row(x, weight, None, tile=Tile(*tile))) if rows == 1 else  # noqa: B023
                            lambda: multiply(x, weight, None, **how))  # noqa: B023
                    except Exception as error:  # a tile that does not fit
                        print(f"    {tile}: {type(error).__name__}: {str(error)[:80]}")
                usual = graphed(lambda: multiply(x, weight, None))  # noqa: B023
                best = min(spent, key=lambda tile: spent[tile])
                print(f"{name} {out}x{size}, {rows:>2} rows: {usual * 1e3:6.1f} us, "
                      f"{moved / usual * 1e3 / bandwidth:.2f} of copy; best tile {best} {spent[best] * 1e3:6.1f} us, "
                      f"{moved / spent[best] * 1e3 / bandwidth:.2f}; bfloat16 {plain * 1e3:6.1f} us", flush=True)
                RESULTS[f"few_bits_{name}_{out}x{size}_{rows}"] = {"us": usual * 1e3, "tile": best,
                                                                   "best_us": spent[best] * 1e3, "bf16_us": plain * 1e3}


def grid_of(scheme: Any, dense: torch.Tensor) -> Any:
    """The grid of a weight that loses bits on load."""
    from hal.config import Topology
    from hal.contracts.communicator import LocalCommunicator
    from hal.models.layers import Build, Linear
    from hal.models.ops import Ops
    from hal.weights import LinearSpec, Projection

    build = Build(Topology(), LocalCommunicator(), Ops(), dense.dtype, dense.device, lambda _: scheme)
    layer = Linear(build, LinearSpec(dense.shape[1], (Projection("x", dense.shape[0]),), "out"), bias=False)
    for name, value in scheme.quantize(dense).items():
        layer.get_parameter(name).data.copy_(value)
    return scheme.grid(layer)


def profile(runner: Any, batch: int) -> None:
    """Where a replay's time goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            runner.graphs[batch].graph.replay()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda r: -r.device_time_total)[:14]
    for r in rows:
        print(f"    {r.device_time_total / 3:8.1f} us in {r.count // 3:>4} x {r.key[:70]}")


def engine(shape: str, cells: list[tuple[int, int]], bandwidth: float, new_tokens: int = 100, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(SHAPES[shape]))
        impl = options.get("model_impl", "native")
        model = read_config(scratch, quantize=options.get("quantize"))
        bits = [str(options[n]) for n in ("quantize", "kv_dtype") if options.get(n) not in (None, "auto")]
        name = " ".join([shape, *bits])
        name = name if impl == "native" else f"{name} ({impl})"
        name += " (batch invariant)" if options.get("batch_invariant") else ""
        name += "".join(f" ({axis} {options[axis]})" for axis in ("tp", "ep") if axis in options)
        begin = time.perf_counter()
        most = max(b for b, _ in cells)
        longest = max(p for _, p in cells) + new_tokens
        options = {"max_num_seqs": most, "max_model_len": longest, "prefix_caching": False, **options}
        with LLM(scratch, device="cuda", random_weights=True, **options) as llm:
            start = time.perf_counter() - begin
            runner = llm.executor._worker.runner
            print(f"{name}: started in {start:.1f} s\n{runner.capture_report()}\n"
                  f"tiles {runner.ops.tiles}", flush=True)
            for size, (own, other) in sums_measured(llm).items():
                print(f"all_reduce of {size >> 10:>5} KiB: {own:6.1f} us over peer memory, {other:6.1f} us by NCCL")
            RESULTS[f"{name}_start_s"] = start
            for batch, prompt in cells:
                time_batch(llm, model.vocab_size, batch, prompt, 8)
                steps: int = options.get("steps_per_message", 1)
                runs = [time_batch(llm, model.vocab_size, batch, prompt, new_tokens) for _ in range(3)]
                step = statistics.median(run.decode_step for run in runs)
                graph = next(g for n, g in sorted(runner.graphs.items()) if n >= batch)
                alone = "tp" not in options  # else the other ranks would have to replay theirs
                bare = milliseconds(graph.graph.replay) if alone else math.nan
                kv_dtype = options.get("kv_dtype", "auto")
                moved = bytes_per_step(model, "bfloat16", kv_dtype, batch, prompt + new_tokens // 2)
                if model.experts is not None:
                    moved += experts_moved(llm, model, batch, prompt)
                floor = moved / bandwidth / options.get("tp", 1)
                several = "" if steps == 1 else f", {steps} steps a message"
                print(f"{name} batch {batch:>4}, prompt {prompt:>5}{several}: {step * 1e3:7.3f} ms a step, "
                      f"{batch / step:9.0f} tok/s, {moved / step / 1e12:.2f} TB/s, {floor / step:.2f} of the floor "
                      f"({floor * 1e3:.2f} ms); bare graph {bare:.3f} ms, ratio {step * 1e3 / bare:.3f}", flush=True)
                RESULTS[f"{name}_{batch}x{prompt}{several}"] = {"ms": step * 1e3, "of_floor": floor / step,
                                                                 "bare_ms": bare,
                                                                 "prefill_s": min(r.prefill for r in runs)}
                if PROFILE:
                    profile(runner, graph.num_seqs)


def sums_measured(llm: LLM) -> dict[int, tuple[float, float]]:
    """What the driver's rank measured at start-up, by size."""
    ways = getattr(llm.executor._worker.communicator, "_faster", {})
    return ways["tp"].measured if "tp" in ways else {}


def experts_moved(llm: LLM, model: Any, batch: int, prompt: int) -> float:
    """Bytes of the experts that decode steps choose, counted in eager steps on one GPU, less those that
    `bytes_per_step` expects; 0 on several GPUs, whose steps must stay alike."""
    runner, e = llm.executor._worker.runner, model.experts
    if runner.config.topology.tp > 1:
        return 0.0
    counts, mixture, graphs, prompts = [], runner.ops.mixture, runner._graph_at, runner.prompts

    def counting(*args: Any) -> tuple[torch.Tensor, ...]:
        results = mixture(*args)
        if len(args[0]) == batch:
            counts.append(len(results[-1].unique()))
        return results

    runner.ops.mixture, runner._graph_at, runner.prompts = counting, [], {}
    time_batch(llm, model.vocab_size, batch, prompt, 8)
    del runner.ops.mixture
    runner._graph_at, runner.prompts = graphs, prompts
    touched = statistics.mean(counts)
    print(f"  experts that a layer's batch of {batch} chooses: {touched:.1f} of {e.count}", flush=True)
    expected = e.count * (1 - (1 - e.per_token / e.count) ** batch)
    of_experts = (h.bytes for name, h in weight_bytes(model, "bfloat16").items() if name.startswith(EXPERTS))
    few_bits = sum(of_experts) if model.quantization is not None else 0
    return (touched - expected) * (few_bits / e.count or 3 * e.size * model.hidden_size * len(e.layers) * 2)


def moe(bandwidth: float, quantize: str | None) -> None:
    """Qwen3-30B-A3B, against the bytes of the experts that the batch chooses; on two GPUs with experts cut (tp) and
    whole (ep)."""
    layouts: list[dict[str, int]] = [{}] + ([{"tp": 2}, {"tp": 2, "ep": 2}] if torch.cuda.device_count() > 1 else [])
    for layout in layouts:
        print(f"layout {layout or 'one GPU'}:", flush=True)
        engine("qwen3-30b-a3b", [(1, 128), (32, 128)], bandwidth, max_num_batched_tokens=4096, quantize=quantize,
               **layout)
        gc.collect()
        torch.cuda.empty_cache()


def few_bit_experts(bandwidth: float, quantize: str | None) -> None:
    """A layer of Qwen3-30B-A3B's experts, chosen at random, in each form of weight: time beside the floor of the bytes
    that are read, and beside the layer in bfloat16. For few choices also in other tiles (outputs, stages, warps)."""
    from hal.weights.configs import ON_LOAD
    from hal.weights.grid import Grid
    from runners.cuda.kernels import experts, few_bits
    from runners.cuda.kernels.few_bit_experts import FEW_TILES, Stacks, Tile
    from runners.cuda.kernels.few_bit_experts import experts as compute

    hidden, size, count, k, device = 2048, 768, 128, 8, "cuda"
    dense = {n: torch.randn(*shape, device=device).mul_(0.02).bfloat16() for n, shape in (
        ("up", (count * 2 * size, hidden)), ("down", (count * hidden, size)))}
    plain = experts.Held(dense["up"], dense["down"].view(count, hidden, size), None, None, 0, count, None)
    packed: dict[str, list[Any]] = {name: [few_bits.few_bits(grid_of(scheme, w)) for w in dense.values()]
                                    for name, scheme in ON_LOAD.items() if quantize in (None, name)}
    if quantize is None:
        packed["mxfp4"] = [few_bits.few_bits(Grid(
            torch.randint(0, 16, w.shape, dtype=torch.uint8, device=device),
            torch.full((len(w), w.shape[1] // 32), 2.0 ** -7, device=device), 32, (len(w),)), True)
            for w in dense.values()]
    for tokens in (1, 4, 32, 128, 512, 4096):
        x = torch.randn(tokens, hidden, device=device).bfloat16()
        weights, chosen = torch.rand(tokens, count, device=device).topk(k)
        chosen = chosen.int()
        touched = len(chosen.unique()) / count
        bf16 = graphed(lambda: experts.experts(x, weights, chosen, plain))  # noqa: B023
        for name, (up, down) in packed.items():
            held = Stacks(up, down, None, None, 0, count, None)
            moved = touched * sum(t.nbytes for w in (up, down) for t in (w.values, w.scales, w.zeros) if t is not None)
            usual = graphed(lambda: compute(x, weights, chosen, held))  # noqa: B023
            print(f"experts {name}, {tokens:>4} tokens, {touched * count:.0f} experts: {usual * 1e3:7.1f} us, "
                  f"{moved / usual * 1e3 / bandwidth:.2f} of the floor of the bytes that are read; "
                  f"bfloat16 {bf16 * 1e3:7.1f} us", flush=True)
            RESULTS[f"experts_{name}_{tokens}"] = {"us": usual * 1e3, "of_floor": moved / usual * 1e3 / bandwidth,
                                                   "bf16_us": bf16 * 1e3}
            if 1 < tokens <= experts.FEW // k:
                spent = {}
                for tile in itertools.product((16, 32, 64), (2, 4), (1, 2, 4)):
                    try:
                        spent[tile] = graphed(lambda: compute(x, weights, chosen, held, Tile(*tile)))  # noqa: B023
                    except Exception as error:  # a tile that does not fit
                        print(f"    {tile}: {type(error).__name__}: {str(error)[:80]}")
                best = min(spent, key=lambda tile: spent[tile])
                usual = tuple(FEW_TILES[up.pieces])
                print(f"    best tile {best} {spent[best] * 1e3:.1f} us, beside {usual}", flush=True)


def small(bandwidth: float) -> None:
    """A small model, whose step is short beside the host's work, with one decode step a message and with eight."""
    for steps in (1, 8):
        engine("qwen2-0.5b", [(1, 128), (32, 128)], bandwidth, new_tokens=8 * 64 + 1, steps_per_message=steps)
        gc.collect()
        torch.cuda.empty_cache()


def impl(bandwidth: float) -> None:
    """The native definition against the Transformers backend, on the same shape."""
    shape, cells = "qwen2-0.5b", [(1, 128), (32, 128)]
    for name in ("native", "transformers"):
        engine(shape, cells, bandwidth, model_impl=name)
        gc.collect()
        torch.cuda.empty_cache()
    for batch, prompt in cells:
        native, other = (RESULTS[f"{name}_{batch}x{prompt}"]["ms"] for name in (shape, f"{shape} (transformers)"))
        print(f"Transformers backend at batch {batch}: {native / other:.2f} of native's rate", flush=True)
        RESULTS[f"impl_{batch}"] = native / other


def invariant(bandwidth: float) -> None:
    """The cost of the same bits in any batch (batch_invariant), on the 8B shape."""
    cells = [(1, 128), (32, 1024), (128, 1024)]
    for options in ({}, {"batch_invariant": True}):
        engine("llama-3-8b", cells, bandwidth, max_num_batched_tokens=8192, **options)
        gc.collect()
        torch.cuda.empty_cache()
    for batch, prompt in cells:
        plain, same = (RESULTS[f"llama-3-8b{name}_{batch}x{prompt}"] for name in ("", " (batch invariant)"))
        print(f"batch_invariant at batch {batch}: a step takes {same['ms'] / plain['ms']:.2f} times as long, prompts "
              f"{same['prefill_s'] / plain['prefill_s']:.2f} times", flush=True)
        RESULTS[f"invariant_{batch}"] = {name: same[name] / plain[name] for name in ("ms", "prefill_s")}


def lora() -> None:
    """Decode steps with 8 adapters of rank 16 on all linear layers beside steps without, on the 8B shape."""
    from safetensors.torch import save_file

    from hal.adapters.files import targets_of

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(SHAPES["llama-3-8b"]))
        model, tensors = read_config(scratch), dict[str, torch.Tensor]()
        for name, (size_in, size_out) in targets_of(model).items():
            for part, shape in (("A", (16, size_in)), ("B", (size_out, 16))):
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = torch.randn(shape).mul_(0.01).bfloat16()
        adapter = os.path.join(scratch, "adapter")
        os.mkdir(adapter)
        save_file(tensors, os.path.join(adapter, "adapter_model.safetensors"))
        Path(adapter, "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 16}))
        with LLM(scratch, device="cuda", random_weights=True, max_num_seqs=32, max_model_len=1152, max_adapters=8,
                 prefix_caching=False, max_num_batched_tokens=8192) as llm:
            names = [str(i) for i in range(8)]
            begin = time.perf_counter()
            for name in names:
                llm.load_adapter(name, adapter)
            print(f"a load is checked in {(time.perf_counter() - begin) / 8:.2f} s", flush=True)
            for batch, prompt in ((1, 128), (32, 128), (32, 1024)):
                times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
                for repeat in range(4):
                    for adapted in times:
                        run = time_prompts(llm, random_prompts(model.vocab_size, batch, prompt), 100,
                                           names if adapted else [None])
                        if repeat:  # the first reads the files
                            times[adapted].append((run.decode_step, run.prefill))
                (plain, first), (with_them, first_with) = (
                    (statistics.median(step for step, _ in runs), min(prefill for _, prefill in runs))
                    for runs in times.values())
                print(f"lora batch {batch:>3}, prompt {prompt:>5}: {with_them * 1e3:.3f} ms a step with adapters, "
                      f"{plain * 1e3:.3f} without, ratio {with_them / plain:.3f}; prompts "
                      f"take {first_with / first:.2f} times as long", flush=True)
                RESULTS[f"lora_{batch}x{prompt}"] = {"ratio": with_them / plain, "ms": with_them * 1e3}


def ranks(bandwidth: float) -> None:
    """The 8B shape over all GPUs of the machine (tp), beside one."""
    cells, several = [(1, 128), (32, 1024), (128, 1024)], torch.cuda.device_count()
    for tp in (1, several):
        engine("llama-3-8b", cells, bandwidth, max_num_batched_tokens=8192, **({"tp": tp} if tp > 1 else {}))
        gc.collect()
        torch.cuda.empty_cache()
    for batch, prompt in cells:
        one, all_ = (RESULTS[f"llama-3-8b{name}_{batch}x{prompt}"]["ms"] for name in ("", f" (tp {several})"))
        print(f"tp {several} at batch {batch}: {one / all_:.2f} times one GPU", flush=True)
        RESULTS[f"tp{several}_{batch}"] = one / all_


def steady() -> None:
    """1,000 decode steps after warm-up: captures, device allocations, and synchronising calls."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(SHAPES["qwen2-0.5b"]))
        with LLM(scratch, device="cuda", random_weights=True, max_num_seqs=16, max_model_len=2048) as llm:
            runner = llm.executor._worker.runner
            for _ in range(16):
                llm.add_request([1] * 64, SamplingParams(max_tokens=1500, ignore_eos=True))
            for _ in range(20):
                llm.step(text=False)
            before = runner.compiled, torch.cuda.memory_stats()["num_device_alloc"]
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(1000):
                llm.step(text=False)
            torch.cuda.set_sync_debug_mode("default")
            after = runner.compiled, torch.cuda.memory_stats()["num_device_alloc"]
            print(f"1,000 steps: {after[0] - before[0]} captures, {after[1] - before[1]} device allocations, 0 syncs")
            RESULTS["steady"] = {"captures": after[0] - before[0], "allocations": after[1] - before[1]}


def mix(count: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens): prompts of 64 to 1,024 tokens, 64 to 256 new ones."""
    draw = random.Random(0)
    return [([draw.randrange(1000, 100000) for _ in range(draw.randint(64, 1024))], draw.randint(64, 256))
            for _ in range(count)]


def rate(jobs: list[tuple[list[int], int]], seconds: float) -> float:
    return sum(len(prompt) + new for prompt, new in jobs) / seconds


def serving() -> None:
    """256 requests that arrive together, against transformers on the same shape: continuous batching where it works,
    else `generate` over batches of similar prompts; a quarter of the requests, since it takes long."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(SHAPES["llama-3-8b"]))
        jobs = mix(256)
        with LLM(scratch, device="cuda", random_weights=True, max_num_seqs=256, max_model_len=2048,
                 max_num_batched_tokens=8192) as llm:
            begin = time.perf_counter()
            llm.generate([p for p, _ in jobs], [SamplingParams(max_tokens=n, ignore_eos=True) for _, n in jobs])
            ours = rate(jobs, time.perf_counter() - begin)
            print(f"serving mix: {ours:.0f} tokens/s, {llm.stats()}", flush=True)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        theirs, how = transformers_rate(scratch, jobs[:64])
    print(f"transformers, {how}: {theirs:.0f} tokens/s; ratio {ours / theirs:.2f}", flush=True)
    RESULTS["serving"] = {"tokens_per_s": ours, "transformers": theirs, "how": how}


def transformers_rate(directory: str, jobs: list[tuple[list[int], int]]) -> tuple[float, str]:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)

    def build(attention: str) -> Any:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention,
                                                    trust_remote_code=False).eval()

    found: list[tuple[float, str]] = []
    model = build("sdpa")
    with torch.inference_mode():
        for batch in (1, 32):
            ids = torch.randint(1000, 100000, (batch, 128), device="cuda")
            args = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
            model.generate(ids, max_new_tokens=2, min_new_tokens=2, **args)
            begin = time.perf_counter()
            model.generate(ids, max_new_tokens=18, min_new_tokens=18, **args)
            torch.cuda.synchronize()
            print(f"transformers {transformers.__version__} generate, eager, batch {batch}: "
                  f"{(time.perf_counter() - begin) / 18 * 1e3:.1f} ms a step", flush=True)
        jobs = sorted(jobs, key=lambda job: len(job[0]))
        begin = time.perf_counter()
        for at in range(0, len(jobs), 32):
            some = jobs[at:at + 32]
            width, new = max(len(p) for p, _ in some), max(n for _, n in some)
            ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in some], device="cuda")
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in some], device="cuda")
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new,
                           pad_token_id=0)
        torch.cuda.synchronize()
        found.append((rate(jobs, time.perf_counter() - begin), "generate in batches of 32"))
    print(found[-1], flush=True)
    for attention in ("sdpa_paged", "paged|sdpa"):
        try:
            model.set_attn_implementation(attention)
            options = GenerationConfig(do_sample=False, max_new_tokens=160, eos_token_id=-1, pad_token_id=0)
            begin = time.perf_counter()
            outputs = model.generate_batch(inputs=[p for p, _ in jobs], generation_config=options)
            seconds = time.perf_counter() - begin
            if len(outputs) == len(jobs):
                found.append((rate([(p, 160) for p, _ in jobs], seconds), f"generate_batch ({attention})"))
                break
        except Exception as error:
            print(f"generate_batch ({attention}): {type(error).__name__}: {str(error)[:200]}", flush=True)
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=["attention", "small", "steady", "8b", "serving"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quantize", choices=("fp8", "int8", "int4"), help="of 8b, moe and experts")
    parser.add_argument("--kv-dtype", default="auto", choices=("auto", "fp8"), help="of the section 8b")
    parser.add_argument("--profile", action="store_true", help="time by kernel")
    args = parser.parse_args()
    global PROFILE
    PROFILE = args.profile
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    RESULTS.update({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bandwidth": bandwidth})
    torch.cuda.empty_cache()
    sections: dict[str, Callable[[], None]] = {
        "attention": lambda: attention(bandwidth),
        "prefill": prefill, "small": lambda: small(bandwidth), "steady": steady,
        "impl": lambda: impl(bandwidth), "moe": lambda: moe(bandwidth, args.quantize),
        "experts": lambda: few_bit_experts(bandwidth, args.quantize),
        "ranks": lambda: ranks(bandwidth), "invariant": lambda: invariant(bandwidth),
        "serving": serving, "lora": lora,
        "few_bits": lambda: few_bits(bandwidth),
        "8b": lambda: engine("llama-3-8b", [(1, 128), (32, 1024), (128, 1024)], bandwidth, quantize=args.quantize,
                             kv_dtype=args.kv_dtype, max_num_batched_tokens=8192)}
    for name in args.sections:
        sections[name]()
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(RESULTS, indent=2))


if __name__ == "__main__":
    main()
