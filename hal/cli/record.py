"""hal record: generate, and write every step to a file"""

from __future__ import annotations

import argparse
from pathlib import Path

from hal import files
from hal.cli import options, streams
from hal.sampling.params import SamplingParams

EPILOG = """example:
  hal record --output run.safetensors --device cpu "37+85=" "123+456="
  hal replay run.safetensors --device cuda

A step that fails is recorded in any program when HAL_RECORD_ON_ERROR names a directory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text to continue")
    parser.add_argument("--output", type=options.path, required=True, metavar="FILE",
                        help="the recording, a safetensors file")
    options.add_engine_options(parser, skip=("async_scheduling",))
    options.add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    files.check_writable("--output", Path(args.output))
    params = SamplingParams(**{"logprobs": 5, **options.sampling_options(args)})
    from hal.config import Topology, WorkerConfig
    from hal.engine.llm import LLM
    from hal.recording.record import RecordingExecutor

    with LLM(**{**options.engine_options(args), "async_scheduling": False}) as llm:
        config = WorkerConfig(llm.config, llm.model_config, Topology())
        recorder = RecordingExecutor(llm.executor, config, llm.backend)
        llm.executor = recorder
        outputs = llm.generate(args.prompts, params)
        recorder.save(Path(args.output))
    for output in outputs:
        print(output.text)
        if output.error is not None:
            streams.complain(output.error, with_traceback=args.traceback)
    return int(any(output.error is not None for output in outputs))
