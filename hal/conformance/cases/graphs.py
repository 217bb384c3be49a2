"""L4: a backend compiles and captures in its warm-up alone, and steps of every size are right."""

from __future__ import annotations

import torch

from hal.conformance.case import NotApplicable, case
from hal.conformance.context import GREEDY, Context, drive
from hal.sampling.params import SamplingParams

_SHORT = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=0)


@case(4, "shapes")
def every_batch_size(ctx: Context) -> None:
    """Decode 1 to max_num_seqs sequences, one more in every step: buckets and graphs of every size give the reference's
    result."""
    session = ctx.session()
    lengths = ctx.rng.integers(1, 20, session.config.engine.max_num_seqs).tolist()
    runs = drive(session.step, session.scheduler(), ctx.prompts(*lengths), GREEDY, apart=1)
    ctx.verify(runs, what="every batch size")


@case(4, "shapes")
def every_length(ctx: Context) -> None:
    """Prompts with lengths near powers of two, alone and in pairs."""
    session = ctx.session()
    runs = []
    for i, lengths in enumerate(((1,), (2,), (3,), (7, 8), (9,), (15, 16), (17,), (31, 33), (63,), (64,), (65, 1))):
        scheduler = session.scheduler()
        scheduler.epoch = i
        runs += drive(session.step, scheduler, ctx.prompts(*lengths), _SHORT)
    ctx.verify(runs, what="every length")


@case(4, "shapes")
def eager_steps_agree(ctx: Context) -> None:
    """Without graphs (EngineConfig.graphs) the same requests give the same tokens, and logprobs that differ by rounding
    alone."""
    captured = ctx.session()
    eager = ctx.session(graphs=False)
    if eager.runner.compiled >= captured.runner.compiled:
        raise NotApplicable("the runner captures no graphs that could be left out")
    prompts = ctx.prompts(17, 3, 30, 9, 1)
    with_graphs, without = (drive(s.step, s.scheduler(), prompts, GREEDY, apart=1) for s in (captured, eager))
    ctx.verify(without, what="eager")
    for i, (a, b) in enumerate(zip(with_graphs, without, strict=True)):
        same = next((n for n, pair in enumerate(zip(a.output, b.output, strict=True)) if pair[0] != pair[1]),
                    len(a.output))
        ctx.close("model", torch.tensor(a.logprobs[:same]), torch.tensor(b.logprobs[:same]).double(),
                  f"graphs and eager steps, sequence {i}")
    ctx.verify(with_graphs, what="with graphs")


@case(4, "warm-up", once=True, alone=True)
def nothing_compiles_afterwards(ctx: Context) -> None:
    """After the warm-up, neither the runner nor a compiler makes a program in a step of any kind. A process of its own
    runs this case, so no program of another case is there."""
    session = ctx.session()
    before = session.programs()
    prompts = ctx.prompts(40, 3, 17, 64, 1, 9, 30, 22, 5)
    sampled = SamplingParams(max_tokens=6, temperature=0.8, top_k=9, top_p=0.9, repetition_penalty=1.1, logprobs=2,
                             ignore_eos=True)
    drive(session.step, session.scheduler(prefix_caching=True), [*prompts, *prompts[:3]],
          [GREEDY, sampled, _SHORT] * 4, apart=1)
    ctx.equal("compiled or captured after the warm-up", session.programs() - before, 0)
    if not before:
        raise NotApplicable("the runner compiles and captures nothing")


@case(4, "warm-up", once=True)
def twice_is_once(ctx: Context) -> None:
    """A second warm-up makes nothing again that the first one has made."""
    session = ctx.session()
    if not session.runner.compiled:
        raise NotApplicable("the runner compiles and captures nothing")
    before, uncompiled = session.programs(), session.runner.uncompiled
    session.warm()
    after = session.programs()
    ctx.check(after <= before * 2 + uncompiled, f"compiled {before} at first, {after} after the second")


@case(4, "warm-up", once=True)
def no_case_has_compiled(ctx: Context) -> None:
    """In no case before this one did a step make a program after the warm-up."""
    if not ctx.late:
        raise NotApplicable("no case ran before this one")
    found = [f"{name}: {text}" for name, texts in ctx.late.items() for text in texts]
    ctx.equal("compiled or captured after a warm-up", found, [])
