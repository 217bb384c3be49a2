"""hal replay: run a recording again, on any device, and compare"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hal.cli import options

EPILOG = """Each step is given the tokens of the recording, so steps are compared one by one. Exit code 1 when one
differs by more than the tolerance of a whole model in this dtype, or when a step that failed fails again.

example:
  hal replay run.safetensors --device cpu"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=options.path, metavar="FILE",
                        help="a recording: of hal record, or of HAL_RECORD_ON_ERROR")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, a backend's name, or module:attribute")
    parser.add_argument("--model", metavar="DIR", help="the checkpoint, where it is not the one that was recorded")
    parser.add_argument("--dtype", metavar="NAME", help="of weights and KV cache (default: the recorded one)")
    parser.add_argument("--kv-dtype", metavar="NAME", help="of the KV cache (default: as recorded, where possible)")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel processes (default: as recorded)")
    parser.add_argument("--pp", type=int, metavar="N", help="pipeline stages (default: as recorded)")


def run(args: argparse.Namespace) -> int:
    from hal.backend import select
    from hal.conformance.tolerance import Tolerances
    from hal.recording.replay import replay

    given: dict[str, Any] = {n: getattr(args, n) for n in ("dtype", "kv_dtype", "tp", "pp")
                             if getattr(args, n) is not None}
    backend = select(args.device)
    device = backend.name if args.device == "auto" else args.device
    comparison = replay(Path(args.file), backend, device, model=args.model, **given)
    print(comparison.table())
    return int(bool(comparison.wrong(Tolerances()("model", comparison.dtype)) or comparison.failure))
