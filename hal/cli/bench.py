"""hal bench: measure speed: TTFT, TPOT, tokens/s, and the memory bandwidth that decoding achieves"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal import files
from hal.cli import options
from hal.cli.options import positive
from hal.cli.shapes import SHAPES
from hal.config import EngineConfig
from hal.contracts.backend import resolve_dtype
from hal.errors import ConfigError

if TYPE_CHECKING:
    from hal.contracts.backend import Backend
    from hal.model_config import ModelConfig

EPILOG = """columns (medians of the repeats; all prompts arrive at once; no prefix caching; end-of-sequence is ignored):
  TTFT     time to first token, mean over the requests        prefill  prompt tokens/s until every request has a token
  TPOT     time per output token after it, mean over them     decode   tokens/s while the whole batch decodes
  GB/s     bytes of weights and KV cache that a rank must read in a decode step, over the time of that step
  of       the same over the bandwidth of reading a large tensor, measured in this process before the benchmark

With --rate, requests arrive one by one (a Poisson process), whether the engine keeps up or not. The columns are then
percentiles over the requests (TTFT, from the arrival on) and over all later tokens (ITL, from the token before). The
last three say where the driver's time of a step goes: host (scheduling, preparing, messages, tokens), execute (the
runner computes the step, or issues it to a device), and wait (for the device's output).

examples:
  hal bench --model-config qwen2-0.5b --batch-sizes 1,8,32 --prompt-len 128 --new-tokens 64
  hal bench --model-config qwen2-0.5b --rate 0.5,1,2 --requests 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-config", type=options.path, metavar="NAME|FILE",
                        help="random weights of this shape instead of a checkpoint: "
                        f"{', '.join(SHAPES)}, or a config.json")
    parser.add_argument("--batch-sizes", type=_sizes, default=[1, 8, 32], metavar="N,N,...", help="default: 1,8,32")
    parser.add_argument("--prompt-len", type=positive, default=128, metavar="N", help="in tokens (default: 128)")
    parser.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="of each request (default: 64)")
    parser.add_argument("--repeat", type=positive, default=3, metavar="N", help="runs to take medians of (default: 3)")
    parser.add_argument("--rate", type=_rates, metavar="R,R,...", help="requests/s that arrive, in place of batches")
    parser.add_argument("--requests", type=positive, default=64, metavar="N", help="for each rate (default: 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--profile", type=options.path, metavar="FILE",
                        help="then write a torch.profiler trace of further batches (of several ranks, the driver's), "
                        "for ui.perfetto.dev")
    options.add_engine_options(parser, skip=("prefix_caching", "trust_remote_code"))


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers")
    return rates


@dataclass(frozen=True, slots=True)
class Row:
    """Medians for one batch size. Times in seconds; bandwidth in bytes/s a rank."""

    batch_size: int
    ttft: float
    tpot: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    achieved_bandwidth: float
    share_of_measured: float


def run(args: argparse.Namespace) -> int:
    if args.new_tokens < 3:
        args.usage_error("--new-tokens must be at least 3: the first is prefill, and decoding is timed between two")
    if args.model_config is not None and hasattr(args, "model"):
        args.usage_error("give either --model or --model-config")
    if args.rate and args.profile is not None:
        args.usage_error("--profile is of batches: leave out --rate")
    if args.profile is not None:
        args.profile = _trace_file(args.profile)
    with tempfile.TemporaryDirectory(prefix="hal-bench-") as scratch:
        report = _bench(args, Path(scratch))
    print(json.dumps(report, indent=2) if args.json else _table(report))
    return 0


def _bench(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    chosen = options.engine_options(args)
    if args.model_config is not None:
        (scratch / "config.json").write_text(json.dumps(_shape(args.model_config)), encoding="utf-8")
        chosen |= {"model": str(scratch), "random_weights": True}
    from hal.checkpoints.hf_config import read_config
    from hal.cli import measure
    from hal.contracts import backend as backends

    length = args.prompt_len + args.new_tokens
    if args.rate:
        return _open_loop(args, EngineConfig(**{"max_model_len": length, **chosen, "prefix_caching": False}))
    largest = max(args.batch_sizes)
    # With the blocks that the scheduler keeps in reserve. Without them the last request may have to wait for another.
    blocks = largest * -(-length // EngineConfig(**chosen).block_size)
    config = EngineConfig(**{"max_model_len": length, "max_num_seqs": largest,
                             "num_blocks": 2 + blocks + blocks // 64, **chosen, "prefix_caching": False})
    model = read_config(config.model, weights=not config.random_weights, impl=config.model_impl,
                        quantize=config.quantize)
    backend = backends.select(config.device)
    dtype = backends.resolve_dtype(backend, config.dtype, model.dtype)
    bandwidth = measure.read_bandwidth(backend)
    cells = measure.run(config, model, args.batch_sizes, args.prompt_len, args.new_tokens, args.repeat,
                        progress=sys.stderr.isatty(), profile=args.profile)
    ranks = config.tp * config.pp
    rows = []
    for batch, runs in cells.items():
        step = statistics.median(r.decode_step for r in runs)
        moved = bytes_per_step(model, dtype, config.kv_dtype, batch, args.prompt_len + args.new_tokens // 2)
        achieved = moved / ranks / step
        rows.append(Row(batch, statistics.median(r.ttft for r in runs), statistics.median(r.tpot for r in runs),
                        batch * args.prompt_len / statistics.median(r.prefill for r in runs), batch / step, achieved,
                        achieved / bandwidth))
    return {**_facts(args, config, model, backend), "threads": measure.threads(), "repeat": args.repeat,
            "measured_bandwidth": bandwidth, "profile": args.profile, "rows": [asdict(row) for row in rows]}


def _open_loop(args: argparse.Namespace, config: EngineConfig) -> dict[str, Any]:
    from hal.checkpoints.hf_config import read_config
    from hal.cli import measure, open_loop
    from hal.contracts import backend as backends

    model, backend = read_config(
        config.model, weights=not config.random_weights, quantize=config.quantize), backends.select(config.device)
    served = open_loop.run(config, model, args.rate, args.requests, args.prompt_len, args.new_tokens,
                           progress=sys.stderr.isatty())
    return {**_facts(args, config, model, backend), "threads": measure.threads(), "requests": args.requests,
            "rows": [each.row() for each in served]}


def _facts(args: argparse.Namespace, config: EngineConfig, model: ModelConfig, backend: Backend) -> dict[str, Any]:
    """What a reader needs to know about a run."""
    from hal.models.memory import memory_line

    return {"memory": memory_line(config, model, resolve_dtype(backend, config.dtype, model.dtype)),
            "model": args.model_config or Path(config.model).name, "parameters": model.num_params,
            "random_weights": config.random_weights, "device": backend.name, "versions": dict(backend.versions()),
            "dtype": resolve_dtype(backend, config.dtype, model.dtype), "tp": config.tp, "pp": config.pp,
            "wire": config.wire, "prompt_len": args.prompt_len, "new_tokens": args.new_tokens}


def _trace_file(file: str) -> str:
    """The file of this process's trace. Each rank that a launcher started writes one of its own.

    Raises:
        ConfigError: the file cannot be written. This is checked before anything is loaded.
    """
    path, rank = Path(file), os.environ.get("RANK", "0")
    path = path if rank == "0" else path.with_name(f"rank{rank}-{path.name}")
    files.check_writable("--profile", path)
    return str(path)


def _shape(name: str) -> dict[str, Any]:
    if name in SHAPES:
        return SHAPES[name]
    try:
        data = json.loads(Path(name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("--model-config is neither a known shape nor a readable config.json", got=f"{name}: {error}",
                          expected=", ".join(SHAPES)) from None
    if not isinstance(data, dict):
        raise ConfigError("--model-config is not a JSON object", got=name)
    return data


def bytes_per_step(model: ModelConfig, dtype: str, kv_dtype: str, batch: int, context: int) -> float:
    """Bytes of weights and KV cache that a decode step has to read, over all ranks. A step reads only the batch's rows
    of the input embedding, unless the embedding is the output head as well. Each layer reads its window of the
    context, and those experts that the batch's tokens choose if they choose at random."""
    item = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    unread = 0 if model.tie_embeddings else (model.vocab_size - batch) * model.hidden_size
    if (e := model.experts) is not None:
        left = e.count * (1 - e.per_token / e.count) ** batch
        unread += round(left * 3 * e.size * model.hidden_size * len(e.layers))
    weights = float(item * model.num_params)
    if model.quantization is not None:
        from hal.models.memory import weight_bytes

        weights = sum(held.bytes for held in weight_bytes(model, dtype).values())
    seen = sum(min(context, window or context) for window in model.windows)
    kv_item = 1 if kv_dtype == "fp8" else item
    return float(weights - item * unread + kv_item * batch * seen * model.kv_entries)


def _table(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    kind = "random weights" if report["random_weights"] else "checkpoint"
    lines = [f"{report['model']} ({report['parameters'] / 1e9:.2f}B, {kind}), {report['dtype']}, {report['device']}"
             f" ({versions}), tp {report['tp']}, pp {report['pp']}, {report['threads']} thread(s) a rank",
             report["memory"]]
    if "requests" in report:
        from hal.cli import open_loop

        return "\n".join([*lines, f"prompt {report['prompt_len']}, {report['new_tokens']} new tokens, "
                          f"{report['requests']} requests a rate, times in ms", "", *open_loop.table(report["rows"])])
    lines += [f"prompt {report['prompt_len']}, {report['new_tokens']} new tokens, medians of {report['repeat']}; "
             f"memory reads {report['measured_bandwidth'] / 1e9:.1f} GB/s here",
             "", "batch |  TTFT ms |  TPOT ms | prefill tok/s | decode tok/s |   GB/s |   of",
             "----- | -------- | -------- | ------------- | ------------ | ------ | ----"]
    lines += [f"{r['batch_size']:>5} | {r['ttft'] * 1e3:8.1f} | {r['tpot'] * 1e3:8.2f} | "
              f"{r['prefill_tokens_per_s']:13.1f} | {r['decode_tokens_per_s']:12.1f} | "
              f"{r['achieved_bandwidth'] / 1e9:6.1f} | {r['share_of_measured']:4.0%}" for r in report["rows"]]
    if report["profile"]:
        lines += ["", f"trace for ui.perfetto.dev: {report['profile']}"]
    return "\n".join(lines)
