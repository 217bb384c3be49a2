"""Timing of an engine, and of a peer beside it: when each request gets its tokens."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch

from hal import profiling
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

_WARM_TOKENS, _PROFILED_TOKENS = 4, 8
_PROBED = 8, 128  # prompt tokens, over the whole batch, of the short runs that come before a row
_LEAST = 3.0  # seconds of a row, however many rows came before it

Event = tuple[float, int, int]  # seconds since the start, the request, and how many tokens it gained
Side = Callable[[list[list[int]], int], "Run"]  # prompts and the number of new tokens -> their times


@dataclass(frozen=True, slots=True)
class Run:
    """Times of one batch whose prompts all arrive together, in seconds.

    Attributes:
        ttft: time to the first token, mean over the requests. tpot: time per token after it, mean over the requests.
        prefill: time until every request has a token. decode_step: time in which each request gains a token while all
            of them decode.
        together: there was such a time. Otherwise decode_step is the mean from the first token to the last.
    """

    ttft: float
    tpot: float
    prefill: float
    decode_step: float
    together: bool = True

    @classmethod
    def of(cls, events: Sequence[Event]) -> Run:
        """The times of these events, which come in order. Each request has at least two tokens."""
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        tokens: dict[int, int] = {}
        for at, request, gained in events:
            first.setdefault(request, at)
            last[request], tokens[request] = at, tokens.get(request, 0) + gained
        begin, end = max(first.values()), min(last.values())
        together = end > begin
        if not together:
            begin, end = min(first.values()), max(last.values())
        gained = sum(n for at, _, n in events if begin < at <= end)
        return cls(statistics.mean(first.values()),
                   statistics.mean((last[i] - first[i]) / max(tokens[i] - 1, 1) for i in first), max(first.values()),
                   (end - begin) * len(first) / max(gained, 1), together)


@dataclass(frozen=True, slots=True)
class Cell:
    """The runs of one batch size.

    Attributes:
        prompt_len, new_tokens: of these runs, which may be fewer than was asked for.
        rounds: in each round, one run of each side.
    """

    batch: int
    prompt_len: int
    new_tokens: int
    rounds: list[list[Run]]


def cells(sides: Sequence[Side], vocab_size: int, batch_sizes: Sequence[int], prompt_len: int, new_tokens: int,
          repeat: int, until: float = math.inf) -> Iterator[Cell]:
    """Time batches of several sizes, each as soon as the one before it is taken. The sides take turns in every round,
    so that a machine that slows down slows all of them.

    Args:
        until: the time of time.perf_counter() to be done by. A row that may take longer than its share has fewer
            rounds, then fewer new tokens, then shorter prompts; the share grows with the batch.
    """
    for i, batch in enumerate(batch_sizes):
        now = time.perf_counter()
        ends = now + max((until - now) * (8 + batch) / sum(8 + b for b in batch_sizes[i:]), _LEAST)
        token, step, new = 0.0, 0.0, min(new_tokens, _WARM_TOKENS)
        for probed in _PROBED:
            if token * probed > max(ends - time.perf_counter(), 0.0) / 4:  # as if more tokens took no less time each
                break
            length = min(prompt_len, max(probed // batch, 1))
            probes = [side(random_prompts(vocab_size, batch, length), new) for side in sides]
            token, step = sum(p.prefill for p in probes) / (batch * length), sum(p.decode_step for p in probes)
        prefill, left = token * batch * prompt_len, ends - time.perf_counter()
        if (repeat + 1) * prefill + repeat * step * new_tokens < left:  # else the short runs were the warm-up
            for side in sides:
                side(random_prompts(vocab_size, batch, prompt_len), new)
            length = prompt_len
        rounds, took = list[list[Run]](), 0.0
        if prefill + step * new_tokens < left:
            length, new = prompt_len, new_tokens
        elif token * batch * length + step * new < left:
            new = min(max(int(left / 2 / step), new), new_tokens)
            length = min(max(int((left - new * step) / token / batch), 1), prompt_len)
        else:  # no time for more than the short run
            rounds = [probes]
        prompts = random_prompts(vocab_size, batch, length)
        while not rounds or (len(rounds) < repeat and time.perf_counter() + took < ends):
            start = time.perf_counter()
            rounds.append([side(prompts, new) for side in sides])
            took = time.perf_counter() - start
        yield Cell(batch, length, new, rounds)


def random_prompts(vocab_size: int, batch: int, prompt_len: int) -> list[list[int]]:
    draw = random.Random(batch)
    return [[draw.randrange(vocab_size) for _ in range(prompt_len)] for _ in range(batch)]


def time_batch(llm: LLM, vocab_size: int, batch: int, prompt_len: int, new_tokens: int) -> Run:
    """See `time_prompts`; the prompts are random."""
    return time_prompts(llm, random_prompts(vocab_size, batch, prompt_len), new_tokens)


def time_prompts(llm: LLM, prompts: list[list[int]], new_tokens: int, adapters: Sequence[str | None] = (None,)) -> Run:
    """Time prompts, with `new_tokens` (at least 3) greedy tokens each; the adapters take turns. Raises NumericsError:
    the model computes NaN, so there is nothing to time."""
    params, events, had = SamplingParams(max_tokens=new_tokens, ignore_eos=True), list[Event](), dict[int, int]()
    start = time.perf_counter()
    for prompt, adapter in zip(prompts, cycle(adapters), strict=False):
        llm.add_request(prompt, replace(params, adapter=adapter))
    while llm.unfinished:
        outputs = llm.step(text=False)
        now = time.perf_counter() - start
        for output in outputs:
            if output.error is not None:
                raise output.error
            request, tokens = output.request_id, len(output.token_ids)
            events.append((now, request, tokens - had.get(request, 0)))
            had[request] = tokens
    return Run.of(events)


def profile(llm: LLM, batch_sizes: Sequence[int], prompt_len: int, new_tokens: int, file: str) -> None:
    """Write a trace of one batch of each size, with a span for each."""
    with profiling.trace(file):
        for batch in batch_sizes:
            with profiling.span(f"batch {batch}"):
                time_batch(llm, llm.model_config.vocab_size, batch, prompt_len, min(new_tokens, _PROFILED_TOKENS))


def threads() -> int:
    """The number of threads that tensor operations of this process use."""
    return torch.get_num_threads()
