"""hal embed: turn texts into embeddings with a model of embeddings"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from hal.cli import batch, options
from hal.cli.results import Results
from hal.errors import ConfigError, NumericsError, RequestError

if TYPE_CHECKING:
    from hal.engine.llm import LLM

EPILOG = """examples:
  hal embed --model DIR "a text" "another text"
  hal embed --model DIR --prompt-name query --input queries.jsonl >vectors.jsonl
  hal embed --model DIR --lines texts.txt

DIR is a sentence-transformers directory; of any other model --pooling says how its hidden states become a vector. A
line of the --input file has "prompt" or "prompt_token_ids", and may have "id". One JSON object a line is written, in
the order of the texts: "index" is the text's place, from 0, "id" is repeated, and "embedding" is a list of numbers. A
text that cannot be embedded is reported with its line; the others run, and the exit code is 1."""
_AT_ONCE = 1024  # texts, whose vectors are written together
_NOT_OURS = ("kv_dtype", "block_size", "num_blocks", "num_cpu_blocks", "prefix_caching", "async_scheduling",
             "speculate", "speculative_tokens", "draft_model", "draft_tp", "steps_per_message", "graphs",
             "generation_config", "chat_template", "max_adapters", "max_adapter_rank", "itl_target_ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a text to embed")
    parser.add_argument("--input", type=options.path, metavar="FILE",
                        help='JSON Lines file of texts; "-" is standard input')
    parser.add_argument("--lines", type=options.path, metavar="FILE",
                        help='file with a text in each line; "-" is standard input')
    parser.add_argument("--prompt-name", metavar="NAME", help="the model's prompt that is put before each text")
    parser.add_argument("--no-truncate", action="store_false", dest="truncate",
                        help="refuse texts that are longer than the model's longest one, instead of cutting them")
    options.add_engine_options(parser, skip=_NOT_OURS)


def run(args: argparse.Namespace) -> int:
    if not args.texts and args.input is None and args.lines is None:
        args.usage_error("give a TEXT, --input FILE or --lines FILE")
    jobs: list[batch.Job | batch.Refused] = list(batch.argument_jobs(args.texts, None))
    for path, plain in ((args.input, False), (args.lines, True)):
        if path is not None:
            jobs += batch.read_jobs(path, None, plain=plain)
    if not jobs:
        raise RequestError("there is nothing to do", got=f"no text in {args.input or args.lines}")
    usable = {index: job for index, job in enumerate(jobs) if isinstance(job, batch.Job)}
    given = options.engine_options(args)
    with Results(len(jobs), as_json=True, ordered=True, with_traceback=args.traceback) as results:
        for index, job in enumerate(jobs):
            if isinstance(job, batch.Refused):
                results.fail(index, job.error, job.id)
        if usable:
            from hal.engine.llm import LLM

            _require_embeddings(given)
            with LLM(**given, progress=sys.stderr.isatty()) as llm:
                places = list(usable)
                for at in range(0, len(places), _AT_ONCE):
                    _embed(llm, {i: usable[i] for i in places[at:at + _AT_ONCE]}, args, results)
    return int(results.failures > 0)


def _require_embeddings(given: dict[str, object]) -> None:
    """Raises ConfigError before anything is loaded: the model makes no embeddings."""
    from hal.checkpoints.hf_config import read_config
    from hal.config import EngineConfig

    engine = EngineConfig(**given)  # type: ignore[arg-type]
    model = read_config(engine.model, impl=engine.model_impl, trust_remote_code=engine.trust_remote_code,
                        pooling=engine.pooling, weights=False)
    if model.embedding is None:
        raise ConfigError("this model generates tokens and makes no embeddings", got=engine.model,
                          expected="a sentence-transformers directory, or --pooling",
                          hint="--pooling last or mean pools the hidden states of any decoder")


def _embed(llm: LLM, jobs: dict[int, batch.Job], args: argparse.Namespace, results: Results) -> None:
    """Embed texts together, and each by itself where one of them is refused, so that it fails alone."""
    try:
        vectors = llm.embed([job.prompt for job in jobs.values()], prompt_name=args.prompt_name, truncate=args.truncate)
    except (RequestError, NumericsError) as error:
        if args.prompt_name is not None and len(jobs) > 1:
            llm.embed([], prompt_name=args.prompt_name)  # an unknown name is one error, not one of each text
        for index, job in jobs.items():
            if len(jobs) == 1:
                results.fail(index, batch.at(error, job.origin), job.id)
            else:
                _embed(llm, {index: job}, args, results)
        return
    for (index, job), vector in zip(jobs.items(), vectors, strict=True):
        results.write(index, job.id, {"embedding": vector.tolist()})
    sys.stdout.flush()
