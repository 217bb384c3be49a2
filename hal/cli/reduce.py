"""hal reduce: find a smaller recording that still shows a fault"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hal import files
from hal.cli import options

EPILOG = """The recording is cut to the step where the device parts from the other one, or fails; then sequences and,
with random weights, layers are left out while the fault stays. What remains is written to --output.

example:
  hal reduce run.safetensors --device NAME --against cpu --output small.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=options.path, metavar="FILE", help="a recording")
    parser.add_argument("--device", required=True, metavar="NAME", help="the one in doubt")
    parser.add_argument("--against", default="cpu", metavar="NAME", help="the one that is right (default: cpu)")
    parser.add_argument("--output", type=options.path, required=True, metavar="FILE", help="the smaller recording")
    options.add_recording_options(parser)


def run(args: argparse.Namespace) -> int:
    files.check_writable("--output", Path(args.output))
    from hal.recording.format import Recording
    from hal.recording.reduce import reduce

    show = (lambda text: print(text, file=sys.stderr)) if sys.stderr.isatty() else (lambda text: None)
    reduction = reduce(Recording.load(Path(args.file)), args.device, args.against, progress=show,
                       **options.recording_options(args))
    reduction.recording.save(Path(args.output))
    print(reduction)
    return 0
