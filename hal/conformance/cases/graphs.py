"""L4: a backend compiles and captures in its warm-up alone, and steps of every size are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from hal.conformance.case import NotApplicable, case
from hal.conformance.checkpoint import LONG
from hal.conformance.context import GREEDY, Context, drive
from hal.recording.format import Recording
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
def full_chunks(ctx: Context) -> None:
    """Steps full of tokens whose number is no power of two, and divides by nothing."""
    session = ctx.session()
    runs = drive(session.step, session.scheduler(max_num_batched_tokens=97), ctx.prompts(110, 97, 98, 3), _SHORT)
    ctx.verify(runs, what="chunks of 97 tokens")


@case(4, "shapes", once=True)
def long_contexts(ctx: Context) -> None:
    """A context that grows past 10,000 tokens, the edge of a block, beside a short one; full chunks of 1,500 tokens."""
    session = ctx.session("long", max_model_len=LONG, num_blocks=680, max_num_seqs=3, max_num_batched_tokens=1500)
    ctx.verify(drive(session.step, session.scheduler(), ctx.prompts(9_999, 5), _SHORT), "long", "a long context")


@case(4, "shapes", once=True)
def those_of_a_recording(ctx: Context) -> None:
    """Lengths, arrivals and limits of the recording that `--shapes` names, with a model and tokens of the kit."""
    if ctx.shapes is None:
        raise NotApplicable("no recording was given (--shapes FILE)")
    recording = Recording.load(Path(ctx.shapes))
    found, engine = _sequences(recording), recording.engine
    size, longest = engine.block_size, max(prompt + new for _, prompt, new in found)
    session = ctx.session("long", max_model_len=longest, block_size=size, max_num_seqs=engine.max_num_seqs,
                          max_num_batched_tokens=engine.max_num_batched_tokens,
                          num_blocks=1 + sum(-(-(prompt + new) // size) for _, prompt, new in found))
    runs = drive(session.step, session.scheduler(), ctx.prompts(*(prompt for _, prompt, _ in found)),
                 [replace(GREEDY, max_tokens=new) for _, _, new in found], [at for at, _, _ in found])
    ctx.verify(runs, "long", f"shapes of {ctx.shapes}")


def _sequences(recording: Recording) -> list[tuple[int, int, int]]:
    """Of each sequence of a recording the step in which it enters, and how many tokens its prompt and its output have.
    What does not fit into the kit's model is cut."""
    found, at = list[list[int]](), dict[int, list[int]]()
    for i, step in enumerate(recording.steps):
        r = step.request
        for row, prompt in zip(r.new_rows.tolist(), r.new_prompt_lens.tolist(), strict=True):
            at[row] = [i, min(prompt, LONG // 2), 1]
            found.append(at[row])
        counts = [1] * len(r.append_rows) if r.append_counts is None else r.append_counts.tolist()
        for row, count in zip(r.append_rows.tolist(), counts, strict=True):
            at[row][2] = min(at[row][2] + count, LONG // 2)
    return [(entered, prompt, new) for entered, prompt, new in found]


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
