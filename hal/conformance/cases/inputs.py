"""L1: the declared input keeps its contracts, and a runner prepares the input that a request means. No kernels run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hal.conformance.case import NotApplicable, case
from hal.conformance.context import Context, Session
from hal.contracts.inputs import NULL_BLOCK, ModelInput, PagedModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.engine.sequence import Sequence
from hal.errors import InputError, StateError
from hal.paged.batch import BatchState
from hal.sampling.params import SamplingParams
from hal.schema import Declared
from hal.testing.strategies import instances, near_misses

_PARAMS = (SamplingParams(), SamplingParams(temperature=0.7, top_k=5), SamplingParams(temperature=1.0, top_p=0.9),
           SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3), SamplingParams(logprobs=2, prompt_logprobs=1),
           SamplingParams(temperature=0.4, min_p=0.1, presence_penalty=0.5),
           SamplingParams(logit_bias=((3, 1.5), (90, -2.0))))


def examples(ctx: Context, drawn: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Try a property on `ctx.examples` values, which the seed alone decides."""
    how = settings(max_examples=ctx.examples, deadline=None, database=None, print_blob=False,
                   phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink), suppress_health_check=list(HealthCheck))
    hypothesis.seed(ctx.seed)(how(given(drawn)(check)))()


def _input_type(ctx: Context) -> type[ModelInput]:
    return ctx.session(warm=False).runner.input_type


def _same(ctx: Context, got: Declared, expected: Declared) -> None:
    for f in type(expected).schema.fields:
        a, b = got[f.name], expected[f.name]
        if f.scope == "replicated":
            ctx.check((a is None) == (b is None) and (a is None or not f.array or (
                a.dtype == b.dtype and a.cpu().contiguous().numpy().tobytes() == b.cpu().contiguous().numpy().tobytes())
                if f.array else a == b), f"{type(got).__name__}.{f.name}: got {a}, expected {b}")


@case(1, "declaration", once=True)
def travels_unchanged(ctx: Context) -> None:
    """Every field of any valid input is unchanged after the message and the copy to the device."""
    kind, device = _input_type(ctx), ctx.backend.device(0)

    def check(value: ModelInput) -> None:
        value.validate()
        value.check()
        there = type(value).from_buffer(value.to_buffer(), device)
        ctx.backend.runtime.synchronize(device)
        there.validate(device)
        _same(ctx, there, value)

    examples(ctx, instances(kind), check)


@case(1, "declaration", once=True)
def near_misses_are_refused(ctx: Context) -> None:
    """An input with one fault is refused, and the error names the field."""
    def check(miss: Any) -> None:
        try:
            miss.instance.validate("cpu")
            miss.instance.check()
        except InputError as error:
            ctx.check(miss.field in error.fields, f"{miss.field} is at fault ({miss.why}), {error.fields} are named")
        else:
            ctx.check(False, f"{miss.field}: {miss.why}, and nothing was raised")

    examples(ctx, near_misses(_input_type(ctx)), check)


@case(1, "declaration", once=True)
def padding_is_harmless(ctx: Context) -> None:
    """An input padded to a bucket is still valid: padding writes the null block alone."""
    kind = _input_type(ctx)
    if not issubclass(kind, PagedModelInput):
        raise NotApplicable(f"{kind.__name__} is not a PagedModelInput")

    def check(value: PagedModelInput) -> None:
        dims = value.dims
        grown = value.padded(num_tokens=dims["num_tokens"] + 3, num_seqs=dims["num_seqs"] + 2,
                             max_blocks=dims["max_blocks"] + 1)
        grown.validate()
        grown.check()

    examples(ctx, instances(kind, min_size=1), check)


def schedule(ctx: Context, session: Session, steps: int = 40) -> list[ExecuteModelRequest]:
    """Requests of an engine whose sequences come and go, share prefixes and are preempted. Nothing is computed."""
    scheduler, rng = session.scheduler(**_CROWDED), ctx.rng
    shared, requests = ctx.prompts(40)[0], []
    for i in range(steps):
        if rng.random() < 0.5:
            own = ctx.prompts(int(rng.integers(1, 30)))[0]
            prompt = shared[:int(rng.integers(0, 41))] + own
            params = _PARAMS[int(rng.integers(len(_PARAMS)))]
            scheduler.add(Sequence(request_id=i, prompt_ids=prompt, params=params, seed=i,
                                   limit=len(prompt) + int(rng.integers(1, 40))))
        step = scheduler.schedule()
        if step is not None:
            requests.append(step.request)
            scheduler.update(step, rng.integers(0, 199, len(step.sampled)))
    return requests


_CROWDED: dict[str, Any] = {"num_blocks": 14, "max_num_batched_tokens": 24, "prefix_caching": True}


@case(1, "prepare", once=True)
def follows_the_request(ctx: Context) -> None:
    """Over schedules with chunks, shared prefixes, and rows and blocks that are used again, a prepared step equals the
    one of the library's own batch state. It is on the device, and preparing it does not communicate."""
    session = ctx.session()
    kind = session.runner.input_type
    if not issubclass(kind, PagedModelInput):
        raise NotApplicable(f"{kind.__name__} is not a PagedModelInput")
    state = BatchState(8, 128, 16, 199, asynchronous=bool(session.config.engine.async_scheduling))
    for request in schedule(ctx, session):
        state.apply(request)
        _holds(ctx, session.prepare(request), state.prepare(request).to(), request.step)


def _holds(ctx: Context, got: PagedModelInput, expected: PagedModelInput, step: int) -> None:
    """Compare an input that may be padded: its real part must equal the expected input."""
    for f in PagedModelInput.schema.fields:
        a, b = got[f.name], expected[f.name]
        if f.array and b is not None:
            ctx.check(a is not None, f"step {step}: {f.name} is missing")
            a = a.cpu()
            ctx.check(all(x >= y for x, y in zip(a.shape, b.shape, strict=True)), f"step {step}: {f.name} is smaller")
            inner = a[tuple(slice(n) for n in b.shape)]
            ctx.check(inner.equal(b), f"step {step}: {f.name} is {inner.tolist()}, expected {b.tolist()}")
        elif f.array and a is not None:  # a field that greedy rows do not need may be present
            asks = f.name == "prompt_targets" or (f.name == "pending_rows" and bool((a >= 0).any()))
            ctx.check(not asks, f"step {step}: {f.name} was not asked for")
        elif not f.array:
            ctx.equal(f"step {step}: {f.name}", a, b)
    real = int(expected.query_start_loc[-1])
    ctx.check(bool((got.slot_mapping[real:].cpu() < got.block_size * (NULL_BLOCK + 1)).all()),
              f"step {step}: padding writes outside the null block")


@case(1, "prepare", once=True)
def a_lost_step_is_named(ctx: Context) -> None:
    """A request that does not follow the one before it is refused with StateError; the right one is then accepted."""
    session = ctx.session()
    first, lost, *_ = (r for r in schedule(ctx, session, 60) if len(r.rows))
    session.prepare(first)
    wrong = ExecuteModelRequest(**{**{f.name: lost[f.name] for f in ExecuteModelRequest.schema.fields},
                                   "digest": lost.digest ^ 1})
    for request in (wrong, first):
        try:
            session.prepare(request)
        except StateError:
            continue
        ctx.check(False, "a request that does not follow was accepted")
    session.prepare(lost)


@case(1, "prepare", once=True)
def repeats_itself(ctx: Context) -> None:
    """Two runners that get the same requests prepare the same steps."""
    sessions = [ctx.session() for _ in range(2)]
    for request in schedule(ctx, sessions[0], 25):
        a, b = (s.prepare(request) for s in sessions)
        _same(ctx, a, b)
