"""Speculative decoding against plain decoding: `python benchmarks/speculation.py [--device cpu|cuda] [--shape NAME]`.

Weights are random, so how often a draft is right is made up: the target's token is replaced by the draft with a known
probability (`--right`). All else is the real engine. For each batch and number of drafts k the table shows the measured
speed-up beside three models, which expect E = (1 - p^(k+1)) / (1 - p) tokens of a round:
- E / (1 + c k), the published analysis (Leviathan et al., arXiv 2211.17192) with the cost ratio c of a draft. There
  verifying costs no more than a plain step;
- E / (v + c k), with v as the cost of a step of n (1 + k) tokens: a plain step of as many sequences of short contexts;
- E over the measured time of a round in which every draft is wrong.
c and v come from plain decoding alone.

    python benchmarks/speculation.py --device cuda --shape llama-3-8b --draft llama-3.2-1b   # a GPU, about 5 minutes
    python benchmarks/speculation.py --ngram                                                 # a CPU, bundled model

`--ngram` is another table: a copy-heavy text (every draft of the n-gram proposer is right with probability 0.95), and a
text that repeats nothing. Plain and speculative runs take turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hal.cli.shapes import SHAPES
from hal.contracts import backend as backends
from hal.contracts.proposer import HostProposer, Propose
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams
from hal.sampling.verification import drafts_behind, verify

_END = 12  # tokens before the end of a request that are not timed
RIGHT = 1.0  # the probability with which a draft is right; None: as the model has it


class Free(HostProposer):
    """A proposer that costs nothing, and is right by chance alone."""

    def begin(self, prompt_ids: Sequence[int]) -> Propose:
        return lambda output_ids, count: [5] * count


def agreeing(name: str) -> Any:
    """The backend `name` with a runner whose tokens are the drafts, each with probability RIGHT."""
    inner = backends.select(name)

    class Agreeing(type(inner)):  # type: ignore[misc]
        def make_runner(self, *args: Any) -> Any:
            runner = inner.make_runner(*args)
            chance = torch.Generator(runner.device).manual_seed(1)

            def judge(sampled: Any, m: Any) -> Any:
                drafts = drafts_behind(m)
                if RIGHT is not None:
                    right = torch.rand(len(drafts), device=drafts.device, generator=chance) < RIGHT
                    other = torch.where(sampled.token_ids == drafts, (drafts + 1) % 100, sampled.token_ids)
                    sampled.token_ids = torch.where(right, drafts, other)
                return verify(sampled, drafts, m.sample_counts, m.max_samples)

            runner.verify = judge
            return runner

    return Agreeing()


device = None  # set by `main`: what the engine finds as "speculation:device"


def rate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    """Tokens a second while all requests decode: from the first token of the last one, until one of them nears its end,
    where it gets fewer drafts."""
    for prompt in prompts:
        llm.add_request(prompt, params)
    first, tokens, begin, found = set[int](), 0, 0.0, 0.0
    while llm.unfinished:
        outputs = llm.step(text=False)
        if len(first) < len(prompts):
            first |= {o.request_id for o in outputs}
            if len(first) == len(prompts):
                begin, tokens = time.perf_counter(), -llm.stats().decode_tokens
        elif not found and any(len(o.token_ids) > params.max_tokens - _END for o in outputs):
            found = (tokens + llm.stats().decode_tokens) / (time.perf_counter() - begin)
    return found


def hold(llm: LLM, count: int) -> None:
    """Propose `count` tokens in every step, whatever is accepted."""
    assert llm.core.speculation is not None
    llm.core.speculation.count, llm.core.speculation._choose = count, lambda rows: None  # type: ignore[method-assign]


def controlled(args: argparse.Namespace) -> None:
    global RIGHT
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for shape in filter(None, (args.shape, args.draft)):
            folders[shape] = Path(scratch) / shape
            folders[shape].mkdir(exist_ok=True)
            (folders[shape] / "config.json").write_text(json.dumps(SHAPES[shape]))
        base: dict[str, Any] = {"device": "speculation:device", "random_weights": True, "max_model_len": 512,
                                "max_num_seqs": max(args.batches), "prefix_caching": False, "graphs": not args.eager}
        how: dict[str, Any] = {"speculate": "draft", "draft_model": str(folders[args.draft])} if args.draft else {
            "speculate": "speculation:Free"}
        times: dict[Any, float] = {}
        kinds: list[tuple[str, str, dict[str, Any]]] = [("plain", args.shape, {})]
        if args.draft:
            kinds.append(("draft alone", args.draft, {}))
        kinds += [(k, args.shape, {**how, "speculative_tokens": k}) for k in args.drafts]
        found: list[tuple[int, int, float, float]] = []
        for kind, shape, options in kinds:
            if kind == "plain":
                options = {"max_num_seqs": max(args.batches) * (1 + max(args.drafts))}
            with LLM(str(folders[shape]), **{**base, **options}) as llm:
                if isinstance(kind, int):
                    print(f"k={kind}: rounds measured at the start, [sequences, drafts, ms]:",
                          [(n, k, round(each * 1e3, 2)) for n, k, each in llm.executor.round_times], flush=True)
                    hold(llm, kind)
                for batch in args.batches:
                    prompts = [[random.randrange(250) for _ in range(64)] for _ in range(batch)]
                    rate(llm, prompts, SamplingParams(max_tokens=_END + 8, ignore_eos=True))
                    for right in (0.0, args.right) if isinstance(kind, int) else (None,):
                        RIGHT, before = right, llm.stats()  # type: ignore[assignment]
                        params = SamplingParams(max_tokens=args.tokens if right else args.tokens // 2, ignore_eos=True)
                        speed = statistics.median(rate(llm, prompts, params) for _ in range(args.repeat))
                        now = llm.stats()
                        times[kind, batch, right] = batch / speed
                        if right:
                            share = (now.accepted_tokens - before.accepted_tokens) / (
                                now.drafted_tokens - before.drafted_tokens)
                            found.append((kind, batch, speed, share))  # type: ignore[arg-type]
                if kind == "plain":
                    for size in {batch * (1 + k) for batch in args.batches for k in args.drafts} | {*args.batches}:
                        prompts = [[random.randrange(250) for _ in range(4)] for _ in range(size)]
                        params = SamplingParams(max_tokens=_END + 32, ignore_eos=True)
                        speed = max(rate(llm, prompts, params) for _ in range(2))
                        times["short", size] = size / speed
        print(f"{args.shape}, {how['speculate']} {args.draft or ''}, drafts right with p={args.right}")
        print("batch  k | plain ms round ms     c     v | accepted    tok/s speed-up | 1 + ck ratio | v + ck ratio | "
              "by round ratio")
        for k, batch, speed, share in sorted(found, key=lambda row: (row[1], row[0])):
            plain, p = times["plain", batch, None], args.right
            tokens = (1 - p**(k + 1)) / (1 - p)
            c = times["draft alone", batch, None] / plain if args.draft else 0.0
            v = times["short", batch * (1 + k)] / times["short", batch]
            up, ideal, verified = speed * plain / batch, tokens / (1 + c * k), tokens / (v + c * k)
            by_round = tokens * plain / times[k, batch, 0.0]
            print(f"{batch:>5} {k:>2} | {plain * 1e3:8.2f} {times[k, batch, 0.0] * 1e3:8.2f} {c:5.2f} {v:5.2f} "
                  f"| {share:8.2f} {speed:8.1f} {up:8.2f} | {ideal:6.2f} {up / ideal:5.2f} | {verified:6.2f} "
                  f"{up / verified:5.2f} | {by_round:8.2f} {up / by_round:5.2f}")


def ngram(args: argparse.Namespace) -> None:
    global RIGHT
    base: dict[str, Any] = {"device": "speculation:device", "max_num_seqs": 4, "prefix_caching": False}
    folder = tempfile.TemporaryDirectory()
    if args.shape:
        (Path(folder.name) / "config.json").write_text(json.dumps(SHAPES[args.shape]))
        base |= {"model": folder.name, "random_weights": True, "max_model_len": 512}
    with LLM(**base) as plain, LLM(**base, speculate="ngram", speculative_tokens=args.drafts[-1]) as fast:
        vocab, length = plain.model_config.vocab_size, min(plain.max_model_len, 512) // 2 - 1
        greedy = SamplingParams(max_tokens=length, ignore_eos=True)
        phrase = [random.randrange(vocab) for _ in range(16)]
        texts = {"copy-heavy": (0.95, (phrase * length)[:length], greedy),
                 "no repetition": (None, [random.randrange(vocab) for _ in range(length)],
                                   SamplingParams(max_tokens=length, ignore_eos=True, temperature=4.0, seed=3))}
        for name, (right, prompt, params) in texts.items():
            RIGHT = right  # type: ignore[assignment]
            rates = [(rate(plain, [prompt], params), rate(fast, [prompt], params)) for _ in range(2 * args.repeat + 1)]
            before, after = (statistics.median(column) for column in zip(*rates[1:], strict=True))
            ratio = statistics.median(b / a for a, b in rates[1:])
            print(f"{name:>14}: plain {before:8.1f} tok/s, n-gram {after:8.1f} tok/s, ratio {ratio:.2f}", flush=True)
        print(fast.stats())
    folder.cleanup()


def main() -> None:
    global device
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--draft", choices=SHAPES, help="shape of a draft model; without it drafts cost nothing")
    parser.add_argument("--ngram", action="store_true")
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--right", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="plain decoding without graphs, too")
    args = parser.parse_args()
    random.seed(1)
    sys.modules["speculation"] = sys.modules[__name__]  # how the engine finds this file's device and proposer
    device = agreeing(args.device)
    if args.ngram:
        ngram(args)
    else:
        args.shape = args.shape or "tiny"
        controlled(args)


if __name__ == "__main__":
    main()
