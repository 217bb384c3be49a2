"""hal replay: run a recording again, on any device, and compare"""

from __future__ import annotations

import argparse
from pathlib import Path

from hal.cli import options

EPILOG = """Each step is given the tokens of the recording, so steps are compared one by one. A file says what was
computed. Options alone say what is read, and how many processes run it. Exit code 1 when a step differs by more than
the tolerance of a whole model in this dtype, or when a step that failed fails again.

example:
  hal replay run.safetensors --device cpu"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=options.path, metavar="FILE",
                        help="a recording: of hal record, or of HAL_RECORD_ON_ERROR")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, a backend's name, or module:attribute")
    options.add_recording_options(parser)
    parser.add_argument("--dtype", metavar="NAME", help="of weights and KV cache (default: the recorded one)")
    parser.add_argument("--kv-dtype", metavar="NAME", help="of the KV cache (default: as recorded, where possible)")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel processes (default: 1)")
    parser.add_argument("--pp", type=int, metavar="N", help="pipeline stages (default: 1)")


def run(args: argparse.Namespace) -> int:
    from hal.contracts.backend import select
    from hal.recording.replay import replay
    from hal.testing.tolerance import Tolerances

    backend = select(args.device)
    device = backend.name if args.device == "auto" else args.device
    comparison = replay(Path(args.file), backend, device,
                        **options.recording_options(args, "dtype", "kv_dtype", "tp", "pp"))
    print(comparison.table())
    return int(bool(comparison.wrong(Tolerances()("model", comparison.dtype)) or comparison.failure))
