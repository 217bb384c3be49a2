"""L3: a tiny model under the real scheduler and executor: every way in which a sequence gets its KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from hal.conformance.case import NotApplicable, case
from hal.conformance.context import BLOCK_SIZE, GREEDY, Context, Run, drive
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest
from hal.features import FOR_SAMPLING
from hal.features.masks import mask_fields
from hal.sampling.params import SamplingParams

_SAMPLED = [SamplingParams(max_tokens=10, temperature=0.9, seed=5), SamplingParams(max_tokens=10),
            SamplingParams(max_tokens=10, temperature=1.2, top_k=20, seed=-3),
            SamplingParams(max_tokens=10, temperature=0.8, top_p=0.8, seed=2**40),
            SamplingParams(max_tokens=10, repetition_penalty=1.3, frequency_penalty=0.4),
            SamplingParams(max_tokens=10, temperature=1.0, min_p=0.05, presence_penalty=0.6, seed=11)]
_SAMPLED = [replace(p, ignore_eos=True) for p in _SAMPLED]
_CROWDED = 11  # blocks, one of them the null block: 3 sequences of 40 + 24 tokens want 12
_LONG = replace(GREEDY, max_tokens=24)


@case(3, "scheduling")
def continuous_batching(ctx: Context) -> None:
    """Sequences enter, in chunks, and leave while others run; rows and blocks are used again."""
    runs = ctx.engine(ctx.prompts(30, 5, 17, 44, 1, 12, 26, 9, 3, 20, 7), apart=2, max_num_seqs=4, num_blocks=13,
                      max_num_batched_tokens=24)
    ctx.verify(runs, what="continuous batching")


@case(3, "scheduling")
def prefix_reuse(ctx: Context) -> None:
    """Prompts with a common prefix share blocks: parts of prompts, and a whole prompt that is cached."""
    shared = ctx.prompts(48)[0]
    prompts = [shared, shared + ctx.prompts(5)[0], shared[:33] + ctx.prompts(9)[0], shared[:32], shared]
    runs = ctx.engine(prompts, apart=3, prefix_caching=True, num_blocks=20)
    ctx.check(sum(r.cached > 0 for r in runs) >= 3, f"the scheduler found {[r.cached for r in runs]} tokens cached")
    ctx.verify(runs, what="prefix reuse")


@case(3, "scheduling")
def preemption_by_recomputing(ctx: Context) -> None:
    """Sequences are preempted half way and computed again into other blocks."""
    _preempted(ctx, ctx.engine(ctx.prompts(40, 40, 40), _LONG, num_blocks=_CROWDED))


@case(3, "scheduling", "swap")
def preemption_by_swapping(ctx: Context) -> None:
    """Sequences' blocks are swapped to the host and back into other blocks."""
    _preempted(ctx, ctx.engine(ctx.prompts(40, 40, 40), _LONG, num_blocks=_CROWDED, num_cpu_blocks=16))


def _preempted(ctx: Context, runs: list[Run]) -> None:
    ctx.check(sum(r.preemptions for r in runs) > 0, "nothing was preempted: the case shows nothing")
    ctx.verify(runs, what="after preemption")


@case(3, "sampling")
def by_the_requests_own_seed(ctx: Context) -> None:
    """Temperature, filters and penalties in one batch: each request's seed decides its tokens."""
    ctx.verify(ctx.engine(ctx.prompts(12, 30, 5, 21, 9, 2), _SAMPLED), what="sampled")


@case(3, "sampling")
def whatever_else_is_in_the_batch(ctx: Context) -> None:
    """The same requests in another order, beside others, in other chunks: the tokens follow from the same seeds."""
    prompts = ctx.prompts(12, 30, 5, 21, 9, 2)
    seeded = [replace(p, seed=i if p.seed is None else p.seed) for i, p in enumerate(_SAMPLED)]
    order = [4, 2, 5, 0, 3, 1]
    runs = ctx.engine([*ctx.prompts(15, 3), *(prompts[i] for i in order)],
                      [_SAMPLED[0], _SAMPLED[2], *(seeded[i] for i in order)], apart=1, max_num_batched_tokens=17)
    ctx.verify(runs, what="sampled beside others")
    if ctx.dtype == "float32":
        first = ctx.engine(prompts, seeded)
        ctx.equal("tokens of the same requests alone and beside others", [r.output for r in runs[2:]],
                  [first[i].output for i in order])


@case(3, "sampling")
def in_two_phases(ctx: Context) -> None:
    """Token masks and biases that arrive when the forward pass has begun give the tokens of those that were there
    before."""
    prompts, vocab = ctx.prompts(12, 30, 5, 21, 9, 2), ctx.config().model.vocab_size
    params = [replace(p, logit_bias=((i, 3.0),) if i % 2 else ()) for i, p in enumerate(_SAMPLED)]
    found = []
    for late in (False, True):
        session = ctx.session()

        def step(request: ExecuteModelRequest, late: bool = late, session: Any = session) -> SamplerOutput:
            rng = np.random.default_rng([ctx.seed, request.step])
            columns: dict[str, Any] = mask_fields(
                {row: rng.random(vocab) < 0.2 for row in request.rows.tolist() if row % 3}, vocab)
            if not late:
                for name, array in columns.items():
                    setattr(request, name, array)
                output: SamplerOutput = session.step(request)
                return output
            for name in (name for feature in FOR_SAMPLING for name in feature.request):
                if request[name] is not None:
                    columns[name] = request[name]
                    setattr(request, name, None)
            output = session.step_in_two_phases(request, columns)
            return output

        found.append([r.output for r in drive(step, session.scheduler(), prompts, params, apart=1)])
    ctx.equal("tokens in two phases", found[1], found[0])


@case(3, "speculation")
def drafts_change_no_token(ctx: Context) -> None:
    """Steps that verify drafts, most of them right or all of them wrong, give the tokens of plain decoding."""
    prompts = ctx.prompts(12, 30, 5, 21, 9, 2, 17)
    params = [replace(p, max_tokens=40, seed=i) for i, p in enumerate((*_SAMPLED, GREEDY))]
    plain = [run.output for run in ctx.engine(prompts, params)]
    session = ctx.session(speculate="ngram", speculative_tokens=3)
    if not session.runner.verifies:
        raise NotApplicable(f"{type(session.runner).__name__} does not verify drafts")
    vocab = session.config.model.vocab_size
    for epoch, errs in enumerate((lambda at: at % 5 == 0, lambda at: True)):

        def propose(number: int, output: list[int], errs: Callable[[int], bool] = errs) -> list[int]:
            at = len(output)
            return [(token + errs(at + i)) % vocab for i, token in enumerate(plain[number][at:at + 3])]

        scheduler = session.scheduler()
        scheduler.epoch = epoch
        runs = drive(session.step, scheduler, prompts, params, apart=1, propose=propose)
        ctx.verify(runs, what="with wrong drafts" if epoch else "with drafts")
        ctx.check(bool(epoch) or sum(run.accepted for run in runs) > 20, "right drafts were not accepted")


@case(3, "steps")
def several_steps_of_a_message_change_no_token(ctx: Context) -> None:
    """Messages of three decode steps give the tokens of one step, also of sequences that end within a message. A row
    that has stopped writes the null block alone."""
    prompts = ctx.prompts(12, 30, 5, 21, 9, 2, 17, BLOCK_SIZE + 1)
    params = [replace(p, max_tokens=22 + 3 * i, seed=i) for i, p in enumerate((*_SAMPLED, GREEDY))]
    params.append(replace(GREEDY, max_tokens=BLOCK_SIZE - 1))
    plain = [run.output for run in ctx.engine(prompts, params)]
    session = ctx.session(steps_per_message=3)
    if not session.runner.multi_step:
        raise NotApplicable(f"{type(session.runner).__name__} takes one decode step a message")
    several, epochs = [0], count()

    def step(request: ExecuteModelRequest) -> SamplerOutput:
        several[0] += request.num_steps == 3
        return session.step(request)

    def runs(chosen: list[int], ends: list[int | None], steps: int = 3, apart: int = 1) -> list[Run]:
        session.fill_cache(0)
        scheduler, several[0] = session.scheduler(steps_per_message=steps, num_blocks=40), 0
        scheduler.epoch = next(epochs)
        return drive(step, scheduler, [prompts[i] for i in chosen], [
            replace(params[i], stop_token_ids=() if at is None else (plain[i][at],))
            for i, at in zip(chosen, ends, strict=True)], apart)

    *everyone, last = range(len(prompts))
    cases: tuple[list[int | None], ...] = [None] * len(everyone), [10 + i for i in everyone]
    for ends in cases:
        found = runs(everyone, ends)
        ctx.check(several[0] > 4, f"{several[0]} messages were of three steps: the case shows nothing")
        ctx.verify(found, what="with several steps")
        if ctx.dtype == "float32":
            ctx.equal("tokens of one step a message", [run.output for run in found], [
                tokens if at is None else tokens[:tokens.index(tokens[at]) + 1]
                for tokens, at in zip(plain, ends, strict=False)])
    # The first token comes with the prompt. So a sequence that ends at such a place ends in a message's first step. The
    # last one goes on meanwhile, or the message might end early. It needs no further block, so both ways of stepping
    # give the blocks in the same order.
    i, at = next((i, at) for i in everyone for at in range(4, 14, 3) if plain[i].index(plain[i][at]) == at)
    written = []
    for steps in (1, 3):
        runs([i, last], [at, None], steps, apart=0)
        written.append([cache[:, 1:] for cache in session.read_cache()])
    for layer, (expected, got) in enumerate(zip(*written, strict=True)):
        ctx.close("model", got, expected.double(), f"layer {layer}: the cache of a row that had stopped")


@case(3, "scheduling", "asynchronous")
def ahead_of_its_tokens(ctx: Context) -> None:
    """Steps are issued before the host knows the tokens of the steps before them."""
    runs = ctx.engine(ctx.prompts(12, 30, 5, 21, 9, 2), _SAMPLED, apart=2, async_scheduling=True, num_blocks=20)
    ctx.verify(runs, what="asynchronous")
