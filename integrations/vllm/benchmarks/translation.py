"""The cost of vLLM in front of hal's ranks, in microseconds a step of decodes. It needs vLLM.

    python integrations/vllm/benchmarks/translation.py [--sequences N]      the translation alone, of steps made here
    python integrations/vllm/benchmarks/translation.py --engine [--profile] whole steps under vLLM's engine, with a
                                                                            model that computes nothing
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

os.environ |= {"HAL_DEVICE": "null", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
               "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}

BLOCK = 16


def steps(count: int) -> Iterator[Any]:
    """SchedulerOutputs as vLLM's scheduler makes them: prompts of 1 to 63 tokens, then decodes without end."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    ids = [f"cmpl-{i:032x}" for i in range(count)]
    lengths = [1 + i * 37 % 63 for i in range(count)]
    free = iter(range(1, 1 << 30))
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [
        NewRequestData(name, [5] * n, [], SamplingParams(temperature=0.0, max_tokens=1000), None,
                       ([next(free) for _ in range(-(-n // BLOCK))],), 0, None)
        for name, n in zip(ids, lengths, strict=True)]
    step.num_scheduled_tokens = dict(zip(ids, lengths, strict=True))
    step.total_num_scheduled_tokens = sum(lengths)
    yield step
    for n in range(1 << 30):
        computed = [length + n for length in lengths]
        blocks = [([next(free)],) if have % BLOCK == 0 else None for have in computed]
        step = SchedulerOutput.make_empty()
        step.scheduled_cached_reqs = CachedRequestData(list(ids), set(), [], {}, blocks, computed, [n + 1] * count)
        step.num_scheduled_tokens = dict.fromkeys(ids, 1)
        step.total_num_scheduled_tokens = count
        yield step


def translation(count: int, repeats: int) -> None:
    """The request of each step, and its output, for `count` decodes."""
    import torch
    from hal_vllm.outputs import take_output
    from hal_vllm.translate import Translator

    from hal.contracts.outputs import SamplerOutput

    translator, times = Translator(count, 32000, 0), {"request": list[float](), "output": list[float]()}
    tokens = SamplerOutput(token_ids=torch.arange(count, dtype=torch.int32))
    for n, source in enumerate(steps(count)):
        start = time.perf_counter()
        step = translator.translate(source)
        middle = time.perf_counter()
        assert step is not None
        take_output(translator, step, tokens)
        end = time.perf_counter()
        if n > 50:
            times["request"].append(middle - start)
            times["output"].append(end - middle)
        if n == repeats + 50:
            break
    times["both"] = [sum(pair) for pair in zip(*times.values(), strict=True)]
    for name, values in times.items():
        print(f"{count} decodes, {name}: median {statistics.median(values) * 1e6:.0f} us, "
              f"least {min(values) * 1e6:.0f} us")


def engine(count: int, repeats: int, profile: bool) -> None:
    """Steps of vLLM's engine core: its scheduler, this package, and hal's driver."""
    import cProfile
    import pstats

    from vllm import LLM, SamplingParams

    from hal.config import BUNDLED_MODEL

    llm = LLM(str(BUNDLED_MODEL), max_num_seqs=count, max_num_batched_tokens=8192, block_size=BLOCK,
              max_model_len=96, dtype="float32", enable_prefix_caching=False)
    core = llm.llm_engine.engine_core.engine_core
    executor, spent = core.model_executor, dict[str, float]()

    def timed(owner: Any, name: str, label: str) -> None:
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - start
            return result
        setattr(owner, name, call)

    if not profile:
        for owner, name, label in (
                (core.scheduler, "schedule", "vLLM's scheduler: schedule"),
                (core.scheduler, "update_from_output", "vLLM's scheduler: update"),
                (executor._translator, "translate", "the translation of requests"),
                (executor._hal, "execute_model", "hal's driver and ranks"),
                (executor, "execute_model", "execute_model"), (executor, "sample_tokens", "sample_tokens")):
            timed(owner, name, label)
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    profiler, walls, shares = cProfile.Profile(), list[float](), list[dict[str, float]]()
    core_step = core.step_fn

    def measured() -> Any:
        spent.clear()
        if profile:
            profiler.enable()
        start = time.perf_counter()
        result = core_step()
        wall = time.perf_counter() - start
        profiler.disable()
        if 5 < number < 85:  # all sequences decode
            walls.append(wall)
            shares.append(dict(spent))
        return result

    core.step_fn = measured
    while len(walls) < repeats:
        for i in range(count):
            llm.llm_engine.add_request(f"r{len(walls)}-{i}", {"prompt_token_ids": [5, 6, 7]}, params)
        number = 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            number += 1
    print(f"a step of {count} sequences: median {statistics.median(walls) * 1e6:.0f} us, least {min(walls) * 1e6:.0f}")
    for name in shares[0]:
        values = [each[name] for each in shares if name in each]
        print(f"  {name}: median {statistics.median(values) * 1e6:.0f} us, least {min(values) * 1e6:.0f}")
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    if given.engine:
        engine(given.sequences, given.repeats, given.profile)
    else:
        translation(given.sequences, given.repeats)
