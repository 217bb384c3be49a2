"""hal generate: continue prompts with a model"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hal.cli import batch, options
from hal.errors import HalError, RequestError
from hal.sampling.params import SamplingParams

if TYPE_CHECKING:
    from hal.engine.llm import LLM
    from hal.engine.outputs import RequestOutput, TokenLogprob

EPILOG = """examples:
  hal generate "37+85="                         the bundled model adds numbers below 1,000
  hal generate --tp 2 "37+85=" "123+456="       the same in two processes
  hal generate --model DIR --temperature 0.8 --max-tokens 64 "Once upon a time"
  hal generate --input prompts.jsonl --json     one object a line in, one a line out, in order

A line of FILE has "prompt" or "prompt_token_ids", and may set sampling options by their names with underscores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text to continue")
    parser.add_argument("--input", metavar="FILE", help='JSON Lines file of requests; "-" is standard input')
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt, in order")
    options.add_engine_options(parser)
    options.add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    if not args.prompts and args.input is None:
        args.usage_error("give a PROMPT, or --input FILE")
    given = options.sampling_options(args)
    params = SamplingParams(**given)
    jobs = [batch.Job(prompt, params) for prompt in args.prompts]
    if args.input is not None:
        jobs += batch.read_jobs(args.input, given)
    if not jobs:
        raise RequestError("there is nothing to do", got=f"no request in {args.input}")
    from hal.engine.llm import LLM

    with LLM(**options.engine_options(args), progress=sys.stderr.isatty()) as llm:
        _check(llm, jobs)
        if len(jobs) == 1 and sys.stdout.isatty() and not args.json:
            _stream(llm, jobs[0])
            return 0
        outputs = llm.generate([job.prompt for job in jobs], [job.params for job in jobs],
                               progress=sys.stderr.isatty())
    for line in _lines(outputs, args.json):
        print(line)
    return 0


def _check(llm: LLM, jobs: list[batch.Job]) -> None:
    """Refuse what this model cannot do before anything runs, naming the line of the input file."""
    for job in jobs:
        try:
            llm.check(job.prompt, job.params)
        except HalError as error:
            raise (batch.at(error, job.origin) if job.origin else error) from None


def _stream(llm: LLM, job: batch.Job) -> None:
    shown = 0
    for output in llm.stream(job.prompt, job.params):
        sys.stdout.write(output.text[shown:])
        sys.stdout.flush()
        shown = len(output.text)
    print(_text(output) if not shown else "")


def _lines(outputs: list[RequestOutput], as_json: bool) -> Iterator[str]:
    if as_json:
        yield from (json.dumps(to_json(output), ensure_ascii=sys.stdout.encoding != "utf-8") for output in outputs)
    elif len(outputs) == 1:
        yield _text(outputs[0])
    else:
        for output in outputs:
            yield f"> {output.prompt if output.prompt is not None else _ids(output.prompt_token_ids)}"
            yield _text(output)


def _text(output: RequestOutput) -> str:
    """The text; token ids where there is no tokenizer."""
    return output.text or (_ids(output.token_ids) if output.prompt is None else "")


def _ids(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def to_json(output: RequestOutput) -> dict[str, Any]:
    """One line of --json. Logprobs are there where they were asked for."""
    line: dict[str, Any] = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids,
                            "token_ids": output.token_ids, "text": output.text, "finish_reason": output.finish_reason}
    if output.logprobs is not None:
        line["logprobs"] = [_logprob(entry) for entry in output.logprobs]
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = [entry and _logprob(entry) for entry in output.prompt_logprobs]
    return line


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {"token_id": entry.token_id, "logprob": _finite(entry.logprob),
            "top": [[token, _finite(value)] for token, value in entry.top]}


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
