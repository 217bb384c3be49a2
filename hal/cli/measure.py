"""Timing of an engine: the arrival of each request's tokens, and the bandwidth of the device's memory."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hal import profiling
from hal.config import EngineConfig
from hal.contracts.backend import Backend
from hal.engine.llm import LLM
from hal.model_config import ModelConfig
from hal.sampling.params import SamplingParams

_WARM_TOKENS, _PROFILED_TOKENS = 4, 8


@dataclass(frozen=True, slots=True)
class Run:
    """Times of one batch whose prompts all arrive together, in seconds.

    Attributes:
        ttft: time to the first token, mean over the requests. tpot: time per token after it, mean over the requests.
        prefill: time until every request has a token. decode_step: time of a step in which all requests decode.
    """

    ttft: float
    tpot: float
    prefill: float
    decode_step: float


def run(config: EngineConfig, model: ModelConfig, batch_sizes: Sequence[int], prompt_len: int, new_tokens: int,
        repeat: int, *, progress: bool = False, profile: str | None = None) -> dict[int, list[Run]]:
    """Time batches of several sizes. The sizes take turns in every repeat, so that a machine that slows down slows all
    of them. Raises the errors of LLM.

    Args:
        profile: the file for a trace of one more batch of each size, with a span for each. These batches run last, when
            everything is timed.
    """
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    with LLM(**options, progress=progress) as llm:
        for batch in batch_sizes:
            time_batch(llm, model.vocab_size, batch, prompt_len, min(new_tokens, _WARM_TOKENS))
        found: dict[int, list[Run]] = {batch: [] for batch in batch_sizes}
        for _ in range(repeat):
            for batch in batch_sizes:
                found[batch].append(time_batch(llm, model.vocab_size, batch, prompt_len, new_tokens))
        if profile is not None:
            with profiling.trace(profile):
                for batch in batch_sizes:
                    with profiling.span(f"batch {batch}"):
                        time_batch(llm, model.vocab_size, batch, prompt_len, min(new_tokens, _PROFILED_TOKENS))
    return found


def time_batch(llm: LLM, vocab_size: int, batch: int, prompt_len: int, new_tokens: int) -> Run:
    """Time random prompts of `prompt_len` tokens, with `new_tokens` (at least 3) greedy tokens each. Raises
    NumericsError: the model computes NaN, so there is nothing to time."""
    draw, params = random.Random(batch), SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    prompts = [[draw.randrange(vocab_size) for _ in range(prompt_len)] for _ in range(batch)]
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    arrivals: list[float] = []
    start = time.perf_counter()
    for prompt in prompts:
        llm.add_request(prompt, params)
    while llm.unfinished:
        outputs = llm.step(text=False)
        if outputs:
            arrivals.append(time.perf_counter() - start)
            for output in outputs:
                if output.error is not None:
                    raise output.error
                first.setdefault(output.request_id, arrivals[-1])
                if output.finish_reason is not None:
                    last[output.request_id] = arrivals[-1]
    begin, end = max(first.values()), min(last.values())
    steps = [b - a for a, b in itertools.pairwise(arrivals) if begin <= a and b <= end]
    return Run(statistics.mean(first.values()),
               statistics.mean(last[i] - first[i] for i in first) / (new_tokens - 1), begin,
               sum(steps) / len(steps) if steps else (max(last.values()) - begin) / (new_tokens - 1))


def read_bandwidth(backend: Backend) -> float:
    """Bytes/s of reading a large tensor: the best of a sum, a dot product and a copy (which reads and writes)."""
    device = backend.device(0)
    size = min(1 << (26 if device.type == "cpu" else 30), backend.free_memory(device) // 4)
    x, y = (torch.ones(size // 4, device=device) for _ in range(2))
    candidates: list[tuple[Callable[[], object], int]] = [
        (x.sum, size), (lambda: torch.dot(x, y), 2 * size), (lambda: y.copy_(x), 2 * size)]
    best = 0.0
    for call, moved in candidates:
        for repeats in (2, 8):  # the first run warms up
            backend.runtime.synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            backend.runtime.synchronize(device)
            rate = repeats * moved / (time.perf_counter() - start)
        best = max(best, rate)
    return best


def threads() -> int:
    """The number of threads that tensor operations of this process use."""
    return torch.get_num_threads()
