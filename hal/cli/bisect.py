"""hal bisect: name the first layer and operation in which two devices part"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hal.cli import options

EPILOG = """Every operation of DEVICE is computed from the arguments that it has on the other device, so that errors do
not add up, and the one that is named is the one at fault. Exit code 1 when one is found.

example:
  hal bisect run.safetensors --device cuda --against cpu"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=options.path, metavar="FILE", help="a recording")
    parser.add_argument("--device", required=True, metavar="NAME", help="the one in doubt")
    parser.add_argument("--against", default="cpu", metavar="NAME", help="the one that is right (default: cpu)")
    parser.add_argument("--model", metavar="DIR", help="the recorded checkpoint; without it, only the bundled model "
                        "is read")
    parser.add_argument("--random-weights", action="store_true", help="initialise the shape that the file gives, where "
                        "it was recorded so")
    parser.add_argument("--kv-dtype", metavar="NAME", help="of the KV cache (default: as recorded, where possible)")
    parser.add_argument("--tolerance", action="append", default=[], metavar="OP:DTYPE=X",
                        help="widen an entry of the table; repeatable")


def run(args: argparse.Namespace) -> int:
    from hal.recording.bisect import bisect
    from hal.testing.tolerance import Tolerances

    given: dict[str, Any] = {"random_weights": True} if args.random_weights else {}
    if args.kv_dtype is not None:
        given["kv_dtype"] = args.kv_dtype
    found = bisect(Path(args.file), args.device, args.against, model=args.model,
                   tolerances=Tolerances.parse(args.tolerance), **given)
    print(found)
    return int(found.divergence is not None)
