"""hal bisect: name the first layer and operation in which two devices part"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from hal.cli import options

EPILOG = """Every operation of DEVICE is computed from the arguments that it has on the other device, so that errors do
not add up, and the one that is named is the one at fault. Exit code 1 when one is found.

With --live there is no recording: the other device generates, and each of its steps is compared.

examples:
  hal bisect run.safetensors --device cuda --against cpu
  hal bisect --live "37+85=" --device mymodule:backend"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=options.path, nargs="?", metavar="FILE", help="a recording")
    parser.add_argument("--live", action="append", metavar="PROMPT", help="a text that the other device continues, "
                        "instead of a recording; repeatable")
    parser.add_argument("--max-tokens", type=options.positive, default=16, metavar="N", help="of each text of --live "
                        "(default: 16)")
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="of weights with --live (default: auto)")
    parser.add_argument("--device", required=True, metavar="NAME", help="the one in doubt")
    parser.add_argument("--against", default="cpu", metavar="NAME", help="the one that is right (default: cpu)")
    options.add_recording_options(parser)
    parser.add_argument("--kv-dtype", metavar="NAME", help="of the KV cache (default: as recorded, where possible)")
    parser.add_argument("--tolerance", action="append", default=[], metavar="OP:DTYPE=X",
                        help="widen an entry of the table; repeatable")


def run(args: argparse.Namespace) -> int:
    from hal.recording.bisect import bisect
    from hal.testing.tolerance import Tolerances

    if (args.file is None) == (args.live is None):
        args.usage_error("give a recording, or --live PROMPT")
    if args.live:
        with tempfile.TemporaryDirectory(prefix="hal-bisect-") as folder:
            args.file, args.live = _recorded(args, Path(folder)), None
            return run(args)
    found = bisect(Path(args.file), args.device, args.against, tolerances=Tolerances.parse(args.tolerance),
                   **options.recording_options(args, "kv_dtype"))
    print(found)
    return int(found.divergence is not None)


def _recorded(args: argparse.Namespace, folder: Path) -> str:
    """A recording of the device that is right."""
    from hal.engine.llm import LLM
    from hal.recording.record import record_run
    from hal.sampling.params import SamplingParams

    given: dict[str, Any] = {"model": args.model} if args.model else {}
    with LLM(device=args.against, dtype=args.dtype, async_scheduling=False, random_weights=args.random_weights,
             **given) as llm:
        record_run(llm, args.live, SamplingParams(max_tokens=args.max_tokens), folder / "live.safetensors")
    return str(folder / "live.safetensors")
