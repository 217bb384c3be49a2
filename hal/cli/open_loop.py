"""Timing of an engine under requests that arrive by themselves, whether the engine keeps up or not (an open loop)."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hal import profiling
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

PERCENTILES = 50, 90, 99


@dataclass(frozen=True, slots=True)
class Served:
    """Times in seconds.

    Attributes:
        rate: requests/s that arrive. seconds: from the start to the last token. tokens: output tokens of all requests.
        ended: requests that had all their tokens in time.
        ttft: of each request, from its arrival to its first token, with the time that it waits in the queue.
        itl: the time between two tokens of a request, for each token but a request's first. If a step gives a request
            several tokens, they share the time since the tokens before.
        step: where the driver's time of a step goes. "host": scheduling, preparing, messages and tokens. "execute": in
            the runner, which computes the step or only issues it to a device. "wait": for the device's output. A device
            that runs behind the host is the limit as long as "wait" is above 0.
    """

    rate: float
    seconds: float
    tokens: int
    ended: int
    ttft: list[float]
    itl: list[float]
    step: dict[str, float]

    def row(self) -> dict[str, Any]:
        """Percentiles, as JSON values."""
        found = {f"{name}_p{p}": float(np.percentile(values, p)) for name, values in (("ttft", self.ttft), (
            "itl", self.itl)) for p in PERCENTILES}
        return {"rate": self.rate, "requests": len(self.ttft), "ended": self.ended, "seconds": self.seconds,
                "tokens_per_s": self.tokens / self.seconds, **found,
                **{f"step_{name}": each for name, each in self.step.items()}}


def arrivals(rate: float, requests: int, seed: int = 0) -> list[float]:
    """Times at which requests arrive, in seconds from the start: a Poisson process, so the gaps are exponential."""
    draw, at, found = random.Random(seed), 0.0, []
    for _ in range(requests):
        at += draw.expovariate(rate)
        found.append(at)
    return found


def serve(llm: LLM, rate: float, requests: int, prompt_len: int, new_tokens: int,
          until: float = math.inf) -> Served:
    """Time random prompts of `prompt_len` tokens, with `new_tokens` greedy tokens each. Raises NumericsError: the model
    computes NaN, so there is nothing to time. `until`: of time.perf_counter(), when requests that have not ended are
    left out, once some request has had its second token."""
    vocab, draw = llm.model_config.vocab_size, random.Random(requests)
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    waiting = deque((at, [draw.randrange(vocab) for _ in range(prompt_len)]) for at in arrivals(rate, requests))
    arrived: dict[int, float] = {}
    last: dict[int, tuple[float, int]] = {}  # of each request, the time of its last tokens and their number
    ttft, itl, tokens, steps, ended, working = list[float](), list[float](), 0, 0, 0, 0.0
    start = time.perf_counter()
    with profiling.timed() as spans:
        while waiting or llm.unfinished:
            now = time.perf_counter() - start
            if start + now > until and itl:
                waiting.clear()
                for request in arrived:
                    llm.abort(request)  # an ended request stays as it is
            while waiting and waiting[0][0] <= now:
                due, prompt = waiting.popleft()
                arrived[llm.add_request(prompt, params)] = due
            if not llm.unfinished:
                time.sleep(max(waiting[0][0] - now, 0) if waiting else 0)
                continue
            outputs = llm.step(text=False)
            begun, now, steps = now, time.perf_counter() - start, steps + 1
            working += now - begun
            for output in outputs:
                if output.error is not None:
                    raise output.error
                before, had = last.get(output.request_id, (arrived[output.request_id], 0))
                gained = len(output.token_ids) - had
                if not gained:
                    continue
                if not had:
                    ttft.append(now - before)
                else:
                    itl += [(now - before) / gained] * gained
                tokens, ended = tokens + gained, ended + (had + gained == new_tokens)
                last[output.request_id] = now, had + gained
        seconds = time.perf_counter() - start
    execute, wait = (spans.get(name, 0.0) for name in ("execute", "fetch"))
    split = {"host": (working - execute - wait) / steps, "execute": execute / steps, "wait": wait / steps}
    return Served(rate, seconds, tokens, ended, ttft, itl, split)


def run(llm: LLM, rates: Sequence[float], requests: int, prompt_len: int, new_tokens: int,
        until: float = math.inf) -> Iterator[Served]:
    """Time each rate after a warm-up, as soon as the one before it is taken. Raises NumericsError. `until`: as of
    `hal.cli.measure.cells`; a rate whose share has passed takes no more requests, and its unfinished ones end."""
    now, parts = time.perf_counter(), len(rates) + 1
    serve(llm, 1e6, min(requests, llm.config.max_num_seqs), prompt_len, min(new_tokens, 4), now + (until - now) / parts)
    for i, rate in enumerate(rates, 1):
        now = time.perf_counter()
        yield serve(llm, rate, requests, prompt_len, new_tokens, now + (until - now) / (parts - i))


_NAMES = [*(f"{name} p{p}" for name in ("TTFT", "ITL") for p in PERCENTILES), "host", "execute", "wait"]
HEAD = ["req/s  | tok/s    | " + " | ".join(f"{name:>8}" for name in _NAMES),
        "------ | -------- | " + " | ".join("-" * 8 for _ in _NAMES)]


def line(row: dict[str, Any], requests: int) -> str:
    """A line of the table, times in milliseconds, and below it how the row differs from what was asked for."""
    times = [row[f"{name}_p{p}"] * 1e3 for name in ("ttft", "itl") for p in PERCENTILES]
    times += [row[f"step_{name}"] * 1e3 for name in ("host", "execute", "wait")]
    found = f"{row['rate']:6.2f} | {row['tokens_per_s']:8.1f} | " + " | ".join(f"{t:8.1f}" for t in times)
    if row["ended"] == requests:
        return found
    few = "; the row means nothing: give a larger --max-seconds" if row["ended"] * 10 < requests else ""
    return f"{found}\n       | for --max-seconds: {row['ended']} of {requests} requests ended{few}"
