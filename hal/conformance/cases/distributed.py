"""L5: several ranks give the result of one rank, with every wire policy and control plane, and fail in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hal.conformance.case import Mismatch, NotApplicable, case
from hal.conformance.context import GREEDY, Context, drive
from hal.engine.scheduler import Scheduler
from hal.errors import ConfigError, WorkerError
from hal.sampling.params import SamplingParams

_PARAMS = [GREEDY, SamplingParams(max_tokens=10, temperature=0.9, ignore_eos=True),
           SamplingParams(max_tokens=8, temperature=1.1, top_p=0.9, repetition_penalty=1.2, ignore_eos=True)]
_DEADLINE = 2.0  # seconds within which a dead rank must be named


def _layout(ctx: Context, shape: str = "llama", **options: Any) -> None:
    can = ctx.backend.capabilities
    if options.get("tp", 1) > can.max_tp or options.get("pp", 1) > can.max_pp:
        raise NotApplicable(f"the backend declares tp up to {can.max_tp} and pp up to {can.max_pp}")
    if can.spmd and "control_plane" in options:
        raise NotApplicable("one process drives the devices of all ranks: nothing crosses a control plane")
    try:
        runs = ctx.engine(ctx.prompts(33, 6, 18), _PARAMS, shape=shape, **{"max_num_batched_tokens": 24, **options})
    except ConfigError as error:
        if "control_plane" in options and "control_plane" in str(error):
            raise NotApplicable(str(error).replace("\n", ";")) from None
        raise
    ctx.verify(runs, shape, ", ".join(f"{k}={v}" for k, v in options.items()))


def _register(name: str, need: str, doc: str, once: bool, **options: Any) -> None:
    def check(ctx: Context) -> None:
        _layout(ctx, **options)

    check.__name__, check.__doc__ = name, doc
    case(5, "layout" if "control_plane" not in options else "control-plane", need, once=once)(check)


_register("tp2", "tp", "Tensors cut in two.", False, tp=2)
_register("pp2", "pp", "Layers cut in two.", False, pp=2)
_register("tp2_requests", "tp", "Tensors cut in two, each rank preparing for itself.", True, tp=2, wire="request")
_register("pp2_requests", "pp", "Layers cut in two, each rank preparing for itself.", True, pp=2, wire="request")
_register("tp2_pp2", "tp", "Both at once.", True, tp=2, pp=2)
_register("tp4_shared_heads", "tp", "More ranks than key-value heads.", True, tp=4)
for _plane in ("gloo", "shm", "collectives"):  # not "ray": the kit starts no cluster
    _register(_plane, "tp", f"The control plane {_plane!r}, where there is one.", True, tp=2, control_plane=_plane)


@case(5, "layout", "tp", "swap", once=True)
def swapping_on_every_rank(ctx: Context) -> None:
    """Block moves reach both ranks' caches."""
    runs = ctx.engine(ctx.prompts(40, 40, 40), SamplingParams(max_tokens=24, ignore_eos=True), tp=2,
                      num_blocks=11, num_cpu_blocks=16)
    ctx.check(sum(r.preemptions for r in runs) > 0, "nothing was preempted: the case shows nothing")
    ctx.verify(runs, what="swapped on two ranks")


def _children() -> set[int]:
    """The child processes that still run. A thread may end before it is asked for its own."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            found |= {int(pid) for pid in file.read().split()}
    return found


def _gone(pids: set[int]) -> bool:
    end = time.monotonic() + _DEADLINE
    while pids & _children() and time.monotonic() < end:
        time.sleep(0.02)
    return not pids & _children()


def _killed(ctx: Context, **layout: Any) -> None:
    if ctx.backend.capabilities.spmd or not os.path.exists("/proc/self/task"):
        raise NotApplicable("ranks have no processes of their own, or this system does not list them")
    seconds = _seconds_until_named(ctx, **layout)
    if seconds >= _DEADLINE:  # a busy machine may be late once, and a device that is late is so again
        seconds = _seconds_until_named(ctx, **layout)
    ctx.check(seconds < _DEADLINE, f"the error came after {seconds:.1f} s")


def _seconds_until_named(ctx: Context, **layout: Any) -> float:
    before = _children()
    config = ctx.config(**layout)
    executor = ctx.executor(config)
    ranks = _children() - before
    scheduler, steps, killed = Scheduler(config.engine, executor.num_blocks), 0, 0.0

    def execute(request: Any) -> Any:
        nonlocal steps, killed
        steps += 1
        if steps == 4:
            killed = time.monotonic()
            os.kill(min(ranks), signal.SIGKILL)
        return executor.execute_model(request).result()

    try:
        drive(execute, scheduler, ctx.prompts(12, 5), GREEDY)
    except WorkerError as error:
        seconds = time.monotonic() - killed
        ctx.equal("rank and cause that the error names", (error.rank, error.cause), (1, "died"))
        ctx.check(_gone(ranks), "processes of the engine are left")
        return seconds
    finally:
        executor.shutdown()
    raise Mismatch("a rank was killed, and the sequences ended all the same")


def _also(name: str, need: str, check: Callable[[Context], None]) -> None:
    check.__name__, check.__doc__ = name, "A rank that is killed between steps is named within 2 s; none is left."
    case(5, "failure", need, once=True)(check)


_also("killed_rank_tp2", "tp", lambda ctx: _killed(ctx, tp=2))
_also("killed_rank_pp2", "pp", lambda ctx: _killed(ctx, pp=2))
