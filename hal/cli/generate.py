"""hal generate: continue prompts with a model"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from hal.checkpoints.generation import recommended, stated
from hal.cli import batch, options, streams
from hal.cli.results import Results, text
from hal.config import EngineConfig
from hal.errors import CapacityError, RequestError
from hal.sampling.params import SamplingParams

if TYPE_CHECKING:
    from hal.engine.llm import LLM
    from hal.engine.request_output import RequestOutput

EPILOG = """examples:
  hal generate "37+85="                         the bundled model adds numbers below 1,000
  hal generate --tp 2 "37+85=" "123+456="       the same in two processes
  hal generate --model DIR --temperature 0.8 --max-tokens 64 "Once upon a time"
  hal generate model.gguf "Once upon a time"    a GGUF file that is the first argument is the model
  hal generate --input prompts.jsonl --json     one object a line in, one a line out
  hal generate --model DIR --adapter law=DIR2 --use-adapter law "Article 1"

A line of FILE has "prompt" or "prompt_token_ids", and may set sampling options by their names with underscores. FILE is
read as UTF-8 in every locale. --json writes a line when its request has finished: "index" is the request's place, from
0, and "id" is repeated from the line of FILE, where that has one. With --n N a request
has N places, one after the other. A line that is no request, or that the model cannot
do, is reported with its number; the others run, and the exit code is 1. So it is where the model computes NaN."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text to continue")
    parser.add_argument("--input", type=options.path, metavar="FILE",
                        help='JSON Lines file of requests; "-" is standard input')
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt, when it has finished")
    parser.add_argument("--ordered", action="store_true", help="with --json: in the order of the prompts")
    options.add_engine_options(parser)
    options.add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.prompts and args.prompts[0].endswith(".gguf") and not hasattr(args, "model") and (
            os.path.isfile(args.prompts[0])):
        args.model = args.prompts.pop(0)
    if not args.prompts and args.input is None:
        args.usage_error("give a PROMPT, or --input FILE")
    given = with_defaults(args)
    jobs: list[batch.Job | batch.Refused] = list(batch.argument_jobs(args.prompts, SamplingParams(**given)))
    if args.input is not None:
        jobs += batch.read_jobs(args.input, given)
    jobs = [one for job in jobs for one in batch.one_output_each(job)]
    if not jobs:
        raise RequestError("there is nothing to do", got=f"no request in {args.input}")
    usable = {index: job for index, job in enumerate(jobs) if isinstance(job, batch.Job)}
    with Results(len(jobs), as_json=args.json, ordered=args.ordered or not args.json,
                 with_traceback=args.traceback) as results:
        for index, job in enumerate(jobs):
            if isinstance(job, batch.Refused):
                results.fail(index, job.error, job.id)
        if usable:
            from hal.engine.llm import LLM

            with LLM(**options.engine_options(args), progress=sys.stderr.isatty()) as llm:
                llm.generate([])  # refuses a model of embeddings once, instead of each prompt
                options.load_adapters(llm, args)
                if len(jobs) == 1 and sys.stdout.isatty() and not args.json:
                    results.report(_stream(llm, usable[0]))
                else:
                    _generate(llm, usable, results)
    return int(results.failures > 0)


def with_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that the user gave, and the model's own for the others."""
    given = options.sampling_options(args)
    found, _ = recommended(EngineConfig(**options.engine_options(args)))
    used = {name: value for name, value in found.items() if name not in given}
    if used:
        streams.say(f"hal: {stated(used)}")
    return {**used, **given}


def _generate(llm: LLM, jobs: dict[int, batch.Job], results: Results) -> None:
    """Run all requests together. A request that this model cannot serve fails alone."""
    from hal.engine.progress import RequestProgress

    places: dict[int, int] = {}
    for index, job in jobs.items():
        try:
            places[llm.add_request(job.prompt, job.params)] = index
        except (RequestError, CapacityError) as error:
            results.fail(index, batch.at(error, job.origin), job.id)
    sys.stdout.flush()
    bar, before = RequestProgress(len(places), sys.stderr.isatty()), llm.stats()
    try:
        while llm.unfinished:
            done = [output for output in llm.step(text=False) if output.finish_reason is not None]
            if done:
                with bar.aside():
                    for output in done:
                        index = places[output.request_id]
                        if output.error is not None:
                            batch.at(output.error, jobs[index].origin)
                        results.finish(index, output, jobs[index].id)
                    sys.stdout.flush()
            if bar.enabled:
                now = llm.stats()
                bar.step(now.prefill_tokens - before.prefill_tokens, now.decode_tokens - before.decode_tokens,
                         len(done))
                before = now
    finally:
        bar.close()


def _stream(llm: LLM, job: batch.Job) -> RequestOutput:
    shown = 0
    for output in llm.stream(job.prompt, job.params):  # at least one request
        sys.stdout.write(output.text[shown:])
        sys.stdout.flush()
        shown = len(output.text)
    print(text(output) if not shown else "")
    return output
