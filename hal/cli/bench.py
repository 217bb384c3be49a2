"""hal bench: measure speed: TTFT, TPOT, tokens/s, and the memory bandwidth that decoding achieves"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal import files
from hal.cli import options, streams
from hal.cli.options import positive
from hal.cli.shapes import SHAPES
from hal.config import AUTO_STEPS, EngineConfig
from hal.contracts.backend import resolve_dtype
from hal.errors import ConfigError

if TYPE_CHECKING:
    from hal.cli.measure import Side
    from hal.cli.peer import Peer
    from hal.contracts.backend import Backend
    from hal.model_config import ModelConfig

EPILOG = """columns (medians of the repeats; all prompts arrive at once; no prefix caching; end-of-sequence is ignored):
  TTFT     time to first token, mean over the requests        prefill  prompt tokens/s until every request has a token
  TPOT     time per output token after it, mean over them     decode   tokens/s while the whole batch decodes
  GB/s     bytes of weights and KV cache that a rank must read in a decode step, over the time of that step
  limits   of prefill and of decode: what they lack, memory bandwidth or arithmetic, and the share that they reach of
           the rate that a large tensor's reading or a large matrix product has in this process, before the benchmark.
           "neither": less than half of both, so the time goes elsewhere (many small operations, the host, other ranks)
  peer     tokens/s of --peer in the same rounds, and ours over them (docs/benchmarks.md)

A row is printed as soon as it is measured. Where --max-seconds would not suffice, a row has fewer repeats, then fewer
new tokens, then shorter prompts, and a line below it says so. With --wire none nothing is bounded, since ranks must
decide alike.

With --rate, requests arrive one by one (a Poisson process), whether the engine keeps up or not. The columns are then
percentiles over the requests (TTFT, from the arrival on) and over all later tokens (ITL, from the token before). The
last three say where the driver's time of a step goes: host (scheduling, preparing, messages, tokens), execute (the
runner computes the step, or issues it to a device), and wait (for the device's output).

examples:
  hal bench --model-config qwen2-0.5b --batch-sizes 1,8,32 --prompt-len 128 --new-tokens 64
  hal bench --model-config qwen2-0.5b --peer llama.cpp --peer-python other/bin/python
  hal bench --model-config qwen2-0.5b --rate 0.5,1,2 --requests 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-config", type=options.path, metavar="NAME|FILE",
                        help="random weights of this shape instead of a checkpoint: "
                        f"{', '.join(SHAPES)}, or a config.json")
    parser.add_argument("--batch-sizes", type=_sizes, default=[1, 8, 32], metavar="N,N,...", help="default: 1,8,32")
    parser.add_argument("--prompt-len", type=positive, default=128, metavar="N", help="in tokens (default: 128)")
    parser.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="of each request (default: 64)")
    parser.add_argument("--repeat", type=positive, default=3, metavar="N", help="runs to take medians of (default: 3)")
    parser.add_argument("--max-seconds", type=_seconds, default=120.0, metavar="S",
                        help="measure less rather than take longer, loading included (default: 120)")
    parser.add_argument("--rate", type=_rates, metavar="R,R,...", help="requests/s that arrive, in place of batches")
    parser.add_argument("--requests", type=positive, default=64, metavar="N", help="for each rate (default: 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--peer", choices=("transformers", "llama.cpp", "vllm", "openvino"),
                        help="time this engine too, in turns with ours, on the same weights")
    parser.add_argument("--peer-python", type=options.path, default=sys.executable, metavar="PATH",
                        help="the Python that has the peer (default: this one)")
    parser.add_argument("--profile", type=options.path, metavar="FILE",
                        help="then write a torch.profiler trace of further batches (of several ranks, the driver's), "
                        "for ui.perfetto.dev")
    options.add_engine_options(parser, skip=("prefix_caching", "trust_remote_code", "chat_template", "max_adapters",
                                              "max_adapter_rank"))


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers")
    return rates


def run(args: argparse.Namespace) -> int:
    if args.new_tokens < 3:
        args.usage_error("--new-tokens must be at least 3: the first is prefill, and decoding is timed between two")
    if args.model_config is not None and hasattr(args, "model"):
        args.usage_error("give either --model or --model-config")
    if args.rate and (args.profile is not None or args.peer is not None):
        args.usage_error("--profile and --peer are of batches: leave out --rate")
    if args.peer is not None and getattr(args, "wire", None) == "none":
        args.usage_error("--peer is timed by one process: choose another --wire")
    if args.profile is not None:
        args.profile = _trace_file(args.profile)
    with tempfile.TemporaryDirectory(prefix="hal-bench-") as scratch:
        report = _bench(args, Path(scratch), (lambda line: None) if args.json else partial(print, flush=True))
    if args.json:
        print(json.dumps(report, indent=2))
    return 0


def _bench(args: argparse.Namespace, scratch: Path, show: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and `show` each line as soon as it is known. Returns the whole report."""
    chosen = options.engine_options(args)
    until = math.inf if chosen.get("wire") == "none" else time.perf_counter() + args.max_seconds
    if args.model_config is not None:
        (scratch / "config.json").write_text(json.dumps(_shape(args.model_config)), encoding="utf-8")
        chosen |= {"model": str(scratch), "random_weights": args.peer is None}
    from hal.checkpoints.hf_config import read_config
    from hal.cli import bench_table, measure, open_loop
    from hal.contracts import backend as backends
    from hal.engine.llm import LLM
    from hal.models import floors

    config = _config(args, chosen)
    model = read_config(config.model, weights=not config.random_weights, impl=config.model_impl,
                        quantize=config.quantize)
    backend = backends.select(config.device)
    report = _facts(args, config, model, backend) | {"threads": measure.threads()}
    show(_title(report))
    peer = None if args.peer is None else _peer(args, config, report, scratch, until)
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    rows: list[dict[str, Any]] = []
    if args.rate:
        show(f"prompt {args.prompt_len}, {args.new_tokens} new tokens, {args.requests} requests a rate, times in ms\n")
        show("\n".join(open_loop.HEAD))
        with LLM(**values, progress=sys.stderr.isatty()) as llm:
            for served in open_loop.run(llm, args.rate, args.requests, args.prompt_len, args.new_tokens, until):
                rows.append(served.row())
                show(open_loop.line(rows[-1], args.requests))
        return report | {"requests": args.requests, "rows": rows}
    device = floors.measure(backend, report["dtype"])
    show(f"prompt {args.prompt_len}, {args.new_tokens} new tokens, medians of {args.repeat}; memory reads "
         f"{device.bandwidth / 1e9:.1f} GB/s here, matrix products {device.arithmetic / 1e12:.3g} TFLOP/s")
    if peer is not None:
        report["peer"] = peer.about
        show(f"beside {peer.about}, {report['threads'] * config.tp * config.pp} thread(s), in turns")
    show("\n" + "\n".join(line + (more if peer else "") for line, more in bench_table.HEAD))
    with peer or nullcontext(), LLM(**values, progress=sys.stderr.isatty()) as llm:
        sides: list[Side] = [partial(measure.time_prompts, llm)]
        if peer is not None:
            sides.append(peer.run)
        for cell in measure.cells(sides, model.vocab_size, args.batch_sizes, args.prompt_len, args.new_tokens,
                                  args.repeat, until):
            row = bench_table.row_of(config, model, report["dtype"], device, cell)
            rows.append(asdict(row))
            show(bench_table.line(row, args))
        imbalance = llm.stats().expert_imbalance
        if imbalance is not None:
            report["expert_imbalance"] = imbalance
            show(f"\nexperts: the most loaded one of a layer has {imbalance:.2f} times the average load")
        if args.profile is not None:
            measure.profile(llm, args.batch_sizes, args.prompt_len, args.new_tokens, args.profile)
            show(f"\ntrace for ui.perfetto.dev: {args.profile}")
    return report | {"repeat": args.repeat, "measured_bandwidth": device.bandwidth,
                     "measured_arithmetic": device.arithmetic, "profile": args.profile, "rows": rows}


def _config(args: argparse.Namespace, chosen: dict[str, Any]) -> EngineConfig:
    """The engine's configuration, with room for every batch at once where the options leave it open.

    Raises:
        ConfigError: a batch or a request does not fit into what the options say.
    """
    length, largest = args.prompt_len + args.new_tokens, max(args.batch_sizes)
    values = {"max_model_len": length, **chosen, "prefix_caching": False}
    if values["max_model_len"] < length:
        raise ConfigError("a request of this benchmark is longer than --max-model-len",
                          got=f"--prompt-len {args.prompt_len} and --new-tokens {args.new_tokens}: {length} tokens",
                          expected=f"at most --max-model-len {values['max_model_len']}")
    if args.rate:
        return EngineConfig(**values)
    config = EngineConfig(**{"max_num_seqs": largest, **values})
    if config.max_num_seqs < largest:
        raise ConfigError("a batch of this benchmark does not run at once", got=f"--batch-sizes up to {largest}",
                          expected=f"at most --max-num-seqs {config.max_num_seqs}")
    if config.num_blocks is not None or config.kv_cache_bytes is not None:
        return config
    # With the blocks that the scheduler keeps in reserve, and those of tokens that a step may add ahead. Without them
    # the last request may have to wait for another. The cache must hold one sequence of max_model_len as well.
    ahead = config.max_samples + (AUTO_STEPS if config.steps_per_message == "auto" else config.steps_per_message)
    blocks = largest * -(-(length + ahead) // config.block_size)
    return replace(config, num_blocks=2 + max(blocks + blocks // 64, -(-values["max_model_len"] // config.block_size)))


def _peer(args: argparse.Namespace, config: EngineConfig, report: dict[str, Any], scratch: Path, until: float,
          ) -> Peer:
    """The peer, with its model loaded, and with the random weights that ours then loads too. Raises as Peer does."""
    from hal.cli.peer import Peer, save_checkpoint

    if args.model_config is not None:
        streams.say("hal: writing a checkpoint of random weights for both")
        save_checkpoint(_shape(args.model_config), scratch)
    streams.say(f"hal: {args.peer} loads the model")
    return Peer(args.peer, args.peer_python, config.model, dtype=report["dtype"], quantize=config.quantize,
                threads=report["threads"] * config.tp * config.pp, length=args.prompt_len + args.new_tokens,
                batch=max(args.batch_sizes), scratch=str(scratch), patience=until - time.perf_counter())


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


def _title(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    kind = "random weights" if report["random_weights"] else "checkpoint"
    return (f"{report['model']} ({report['parameters'] / 1e9:.2f}B, {kind}), {report['dtype']}, {report['device']}"
            f" ({versions}), tp {report['tp']}, pp {report['pp']}, {report['threads']} thread(s) a rank\n"
            f"{report['memory']}")
