"""hal record: generate, and write every step to a file"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hal import files
from hal.cli import options, streams
from hal.sampling.params import SamplingParams

if TYPE_CHECKING:
    from hal.engine.request_output import RequestOutput

EPILOG = """example:
  hal record --output run.safetensors --device cpu "37+85=" "123+456="
  hal replay run.safetensors --device cuda

  hal record --shareable --from step-11.safetensors --device NAME --output for-others.safetensors

A step that fails is recorded in any program when HAL_RECORD_ON_ERROR names a directory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text to continue")
    parser.add_argument("--from", dest="source", type=options.path, metavar="FILE",
                        help="take the steps of this recording instead of prompts, and run them here")
    parser.add_argument("--shareable", action="store_true",
                        help="replace every token by another one, and leave out text, paths and error messages")
    parser.add_argument("--output", type=options.path, required=True, metavar="FILE",
                        help="the recording, a safetensors file")
    options.add_engine_options(parser, skip=("async_scheduling", "chat_template"))
    options.add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    if bool(args.prompts) == (args.source is not None):
        args.usage_error("give prompts, or --from FILE")
    files.check_writable("--output", Path(args.output))
    if args.source is not None:
        return _again(args)
    if args.shareable:  # never, not even after an error, are the tokens in the file that is to be shared
        with tempfile.TemporaryDirectory(prefix="hal-record-") as folder:
            args.source = str(Path(folder) / "private.safetensors")
            _record(args, args.source)
            return _again(args)
    outputs = _record(args, args.output)
    for output in outputs:
        print(output.text)
        if output.error is not None:
            streams.complain(output.error, with_traceback=args.traceback)
    return int(any(output.error is not None for output in outputs))


def _record(args: argparse.Namespace, path: str) -> list[RequestOutput]:
    params = SamplingParams(**{"logprobs": 5, **options.sampling_options(args)})
    from hal.engine.llm import LLM
    from hal.recording.record import record_run

    with LLM(**{**options.engine_options(args), "async_scheduling": False}) as llm:
        options.load_adapters(llm, args)
        return record_run(llm, args.prompts, params, Path(path))


def _again(args: argparse.Namespace) -> int:
    """Run the steps of a recording, with other tokens if the result is to be shared, and keep the outputs."""
    from hal.contracts.backend import select
    from hal.contracts.executor import make_executor
    from hal.recording.format import Recording
    from hal.recording.share import KEPT, refill, shareable

    recording = Recording.load(Path(args.source))
    if args.shareable:
        recording = shareable(recording)
    given = {name: value for name, value in options.engine_options(args).items() if name in ("random_weights", "model")}
    model = given.pop("model", None)
    backend = select(args.device)
    config = recording.config(backend, device=backend.name if args.device == "auto" else args.device, model=model,
                              adapters=dict(args.adapters), **given)
    refill(recording, lambda: make_executor(config.engine, config.model, backend))
    recording.info["device"] = backend.name
    recording.save(Path(args.output))
    if args.shareable:
        print(KEPT)
    return 0
