"""L6: the library's own recordings replay, and a runner does not communicate by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hal import guard
from hal.conformance.case import Mismatch, NotApplicable, case
from hal.conformance.context import GREEDY, Context, drive
from hal.engine.scheduler import Scheduler
from hal.errors import GuardError
from hal.sampling.params import SamplingParams

GOLDEN = Path(__file__).parents[2] / "assets" / "golden"
_SAMPLED = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, repetition_penalty=1.1, logprobs=2, ignore_eos=True)


@case(6, "guard", once=True)
def prepare_and_execute_are_silent(ctx: Context) -> None:
    """Under the strict guard, steps of every kind communicate through the Communicator alone, and not at all while
    they prepare."""
    guard.install(strict=True)
    session = ctx.session()
    prompts = ctx.prompts(30, 4, 17, 1)
    drive(session.step, session.scheduler(prefix_caching=True), [*prompts, prompts[0]],
          [GREEDY, _SAMPLED, GREEDY, _SAMPLED, GREEDY])


@case(6, "guard", "tp", once=True)
def so_are_those_of_two_ranks(ctx: Context) -> None:
    """The same on two ranks, with the wire policy under which both prepare."""
    ctx.engine(ctx.prompts(9, 3), [GREEDY, _SAMPLED], tp=2, wire="request")


@case(6, "guard", once=True)
def a_violation_is_refused(ctx: Context) -> None:
    """The guard stops the backend's own runner when it communicates in either phase, and names the call."""
    for method, where in (("prepare_model_input", "prepare"), ("execute_model", "execute")):
        session = ctx.session()
        own = getattr(session.runner, method)

        def talk(*args: Any, own: Any = own) -> Any:
            dist.HashStore().set("a", "b")  # type: ignore[attr-defined]
            return own(*args)

        setattr(session.runner, method, talk)
        guard.install()
        try:
            drive(session.step, session.scheduler(), ctx.prompts(5), GREEDY)
        except GuardError as error:
            ctx.equal("phase and operation named", (str(error.phase), "set" in error.operation), (where, True))
        else:
            raise Mismatch(f"communication in phase {where} passed")


@case(6, "replay", "checkpoints")
def golden_recordings(ctx: Context) -> None:
    """Recordings made on other devices give the same tokens here, except where two logits were close."""
    from hal.recording.replay import replay

    files = sorted(GOLDEN.glob("*.safetensors"))
    if not files:
        raise NotApplicable("no recordings come with this library")
    for path in files:
        comparison = replay(path, ctx.backend, ctx.device, dtype=ctx.dtype)
        ctx.check(not comparison.wrong(ctx.tolerances("model", ctx.dtype)), f"{path.name}:\n{comparison.table()}")


@case(6, "replay", once=True)
def its_own_recording(ctx: Context) -> None:
    """A run of this backend is recorded, written, read and replayed, and the results agree to the last bit."""
    from hal.recording.record import RecordingExecutor
    from hal.recording.replay import replay

    config = ctx.config()
    recorder = RecordingExecutor(ctx.executor(config), config, ctx.backend)
    path = ctx.scratch / "own.safetensors"
    try:
        scheduler = Scheduler(replace(config.engine, prefix_caching=True), recorder.num_blocks)
        drive(lambda r: recorder.execute_model(r).result(), scheduler, ctx.prompts(20, 3, 9),
              [GREEDY, _SAMPLED, GREEDY], apart=2)
        recorder.save(path)
    finally:
        recorder.shutdown()
    comparison = replay(path, ctx.backend, ctx.device, model=config.engine.model)
    ctx.check(comparison.exact, f"a replay on the same device differs:\n{comparison.table()}")
