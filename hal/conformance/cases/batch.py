"""L3 and L5: a request has the same bits whatever else is in its batch, where the backend declares it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hal.conformance.case import NotApplicable, case
from hal.conformance.context import GREEDY, Context, Run, drive
from hal.engine.scheduler import Scheduler
from hal.sampling.params import SamplingParams

_WATCHED = [replace(GREEDY, max_tokens=8),
            SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, seed=7, logprobs=0, ignore_eos=True)]
_OTHER = SamplingParams(max_tokens=6, temperature=1.1, ignore_eos=True)
_MOST = 64  # others
_Drive = Callable[[list[list[int]], list[SamplingParams], int], list[Run]]


def _difference(ctx: Context, run: _Drive, others: tuple[int, ...]) -> str | None:
    """Where a request among others first differs from itself alone.

    Args:
        run: drives prompts with their parameters and a number of tokens a step. others: how many, in each mix.
    """
    watched, beside = ctx.prompts(33, 5), ctx.prompts(*ctx.rng.integers(1, 20, _MOST).tolist())
    alone = [run([prompt], [each], 128)[0] for prompt, each in zip(watched, _WATCHED, strict=True)]
    for n, tokens in [*((n, 128) for n in others), (2, 13)]:
        # The watched ones have other rows, and begin in other steps, than alone.
        prompts, params = [*beside[:n // 2], *watched, *beside[n // 2:n]], [_OTHER] * (n + 2)
        params[n // 2:n // 2 + 2] = _WATCHED
        for i, (got, own) in enumerate(zip(run(prompts, params, tokens)[n // 2:n // 2 + 2], alone, strict=True)):
            pairs = [list(zip(r.output, r.logprobs, strict=True)) for r in (got, own)]
            at = next((at for at, (x, y) in enumerate(zip(*pairs, strict=True)) if x != y), None)
            if at is not None:
                (token, found), (expected, value) = pairs[0][at], pairs[1][at]
                return (f"{'sampled' if i else 'greedy'} request among {n} others, {tokens} tokens a step: output "
                        f"token {at} is {token} with logprob {found!r}; alone it is {expected} with {value!r}")
    return None


def _options(ctx: Context) -> dict[str, Any]:
    return {"batch_invariant": ctx.backend.capabilities.batch_invariant == "option", "max_num_seqs": _MOST + 2,
            "num_blocks": 4 * _MOST}


@case(3, "batch")
def the_same_bits_in_any_batch(ctx: Context) -> None:
    """Tokens and logprobs of a request are equal to the last bit alone, among 2, 44 and 64 others, and chunked, where
    the backend declares it. Otherwise the first difference is told."""
    declares = ctx.backend.capabilities.batch_invariant != "no"
    session, epoch = ctx.session(**_options(ctx) if declares else {}), 0

    def run(prompts: list[list[int]], params: list[SamplingParams], tokens: int) -> list[Run]:
        nonlocal epoch
        scheduler = session.scheduler(max_num_batched_tokens=tokens)
        scheduler.epoch, epoch = epoch, epoch + 1
        return drive(session.step, scheduler, prompts, params)

    found = _difference(ctx, run, (2, 44, _MOST) if declares else (2,))
    if not declares:
        raise NotApplicable(f"the same bits in any batch are not declared; {found or 'no bit was found to differ'}")
    ctx.check(found is None, found or "")


@case(5, "layout", "tp", "batch_invariant", once=True)
def tp2_the_same_bits_in_any_batch(ctx: Context) -> None:
    """The same with tensors cut in two: alone, among 2 and 44 others, and chunked."""
    config = ctx.config(tp=2, **_options(ctx))
    executor, epoch = ctx.executor(config), 0

    def run(prompts: list[list[int]], params: list[SamplingParams], tokens: int) -> list[Run]:
        nonlocal epoch
        scheduler = Scheduler(replace(config.engine, max_num_batched_tokens=tokens), executor.num_blocks)
        scheduler.epoch, epoch = epoch, epoch + 1
        return drive(lambda request: executor.execute_model(request).result(), scheduler, prompts, params)

    try:
        found = _difference(ctx, run, (2, 44))
        ctx.check(found is None, found or "")
    finally:
        executor.shutdown()
