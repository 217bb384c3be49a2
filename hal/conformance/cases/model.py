"""L3: a tiny model, step by step in this process: the results, the memory that is written, and the rest."""

from __future__ import annotations

from typing import Any

import torch

from hal.conformance.case import NotApplicable, case
from hal.conformance.context import BLOCK_SIZE, GREEDY, Context, Session, drive
from hal.conformance.reference import Reference
from hal.contracts.inputs import NULL_BLOCK, PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest


def _runs(name: str, doc: str, *needs: str, shape: str = "llama", block_size: int = BLOCK_SIZE, **scheduling: Any,
          ) -> None:
    """Register a case that runs a model of some shape."""
    def check(ctx: Context) -> None:
        session, prompts = ctx.session(shape, block_size=block_size), ctx.prompts(40, 17, 16, 1)
        ctx.verify(drive(session.step, session.scheduler(**scheduling), prompts, GREEDY), shape, name)

    check.__name__, check.__doc__ = name, doc
    case(3, "model", *needs)(check)


_runs("llama", "Grouped queries, rotary positions, a gated MLP: prefill, then decoding in a batch.")
_runs("sliding_window", "Every layer sees 8 tokens back; contexts grow to 52.", "checkpoints", shape="window")
_runs("qwen3", "Norms of queries and keys, heads wider than hidden_size / num_heads, the embedding as output head.",
      "checkpoints", shape="qwen3")
_runs("gpt2", "Learned positions, layer norms, biases everywhere, weights stored the other way round.", "checkpoints",
      shape="gpt2")
_runs("chunked_prefill", "Prompts in pieces of at most 13 tokens, mixed with decoding.", max_num_batched_tokens=13)
_runs("small_blocks", "Blocks of 4 tokens: slots follow from the block size of the step.", block_size=4)


@case(3, "model")
def to_the_end_of_the_context(ctx: Context) -> None:
    """Positions up to the model's last one."""
    session, prompts = ctx.session(), ctx.prompts(116, 63)
    ctx.verify(drive(session.step, session.scheduler(), prompts, GREEDY), "llama", "long contexts")


def _paged(session: Session, model_input: Any) -> PagedModelInput:
    if not isinstance(model_input, PagedModelInput):
        raise NotApplicable(f"{type(model_input).__name__} is not a PagedModelInput")
    return model_input


@case(3, "cache")
def writes_nothing_else(ctx: Context) -> None:
    """A step writes the blocks that its tokens are mapped to and the null block, in a batch of any composition."""
    session, prompts = ctx.session(warm=False), ctx.prompts(30, 5, 21, 1, 3)
    session.fill_cache(0.5, first=1)  # blocks without an owner hold values that no step may change or depend on
    session.warm()  # at once, since a device may compile these operations

    def step(request: ExecuteModelRequest) -> SamplerOutput:
        m = _paged(session, session.prepare(request))
        before = session.read_cache()
        output = session.execute(m)
        real = int(m.query_start_loc[-1])
        mapped = set((m.slot_mapping[:real].cpu() // m.block_size).tolist()) | {NULL_BLOCK}
        for layer, (cache, old) in enumerate(zip(session.read_cache(), before, strict=True)):
            changed = session.blocks[(cache != old).transpose(0, 1).flatten(1).any(1)].tolist()
            ctx.check(set(changed) <= mapped, f"step {request.step} wrote blocks {sorted(set(changed) - mapped)} of "
                      f"cache {layer}; its tokens are in {sorted(mapped)}")
        return session.fetch(output)

    ctx.verify(drive(step, session.scheduler(), prompts, GREEDY, apart=2), "llama", "over used blocks")


@case(3, "cache")
def warmup_leaves_it_clean(ctx: Context) -> None:
    """The warm-up writes the null block alone."""
    session = ctx.session()
    written = [int(c[:, 1:].ne(0).sum()) for c in session.read_cache()]
    ctx.equal("values written outside the null block", written, [0] * len(written))


@case(3, "model", "checkpoints")
def no_worse_than_its_dtype(ctx: Context) -> None:
    """Logprobs are about as far from the fp64 reference as a plain computation in this dtype is."""
    session, found = ctx.session(), list[torch.Tensor]()
    runs = drive(session.step, session.scheduler(), ctx.prompts(40, 16, 1, 25), GREEDY)
    for compute in (torch.float64, ctx.torch_dtype):
        reference = Reference(ctx.model("llama"), session.config.model, ctx.dtype, compute)
        found.append(torch.cat([reference.logits(r.tokens)[r.prompt - 1:-1].double().log_softmax(-1).gather(
            1, torch.tensor(r.output)[:, None])[:, 0] for r in runs]))
    exact, rounded = found
    ctx.no_worse(torch.tensor([value for r in runs for value in r.logprobs]), exact, rounded, "logprobs")


@case(3, "cache", "checkpoints")
def contents(ctx: Context) -> None:
    """Keys and values in the cache are those of the reference, in every layer and slot, also those that no token has
    been computed from yet; and they are about as exact as this dtype allows."""
    session = ctx.session()
    slots: dict[int, list[tuple[int, int]]] = {}  # by row, token and slot of each position

    def step(request: ExecuteModelRequest) -> SamplerOutput:
        m = _paged(session, session.prepare(request))
        starts, ids, into = (x.tolist() for x in (m.query_start_loc, m.input_ids, m.slot_mapping))
        for row, start, end in zip(request.rows.tolist(), starts, starts[1:], strict=False):
            slots.setdefault(row, []).extend(zip(ids[start:end], into[start:end], strict=True))
        return session.fetch(session.execute(m))

    drive(step, session.scheduler(max_num_batched_tokens=24), ctx.prompts(37, 15, 2), GREEDY)
    caches, model = session.read_cache(), session.config.model
    if caches[0].shape[2:] != (model.num_kv_heads, BLOCK_SIZE, model.head_dim):
        raise NotApplicable(f"{type(session.runner).__name__} has no cache of [2, blocks, kv heads, block size, dim]")
    parts: list[list[torch.Tensor]] = [[], [], []]  # [layers, tokens, 2, kv heads, dim] each
    for kept in slots.values():
        at = torch.tensor([slot for _, slot in kept])
        parts[0].append(torch.stack([cache[:, at // BLOCK_SIZE, :, at % BLOCK_SIZE] for cache in caches]).double())
        for part, compute in zip(parts[1:], (torch.float64, ctx.torch_dtype), strict=True):
            reference = Reference(ctx.model("llama"), model, ctx.dtype, compute)
            reference.logits([token for token, _ in kept])
            part.append(torch.stack([torch.stack(pair, 1) for pair in reference.kept]).double())
    got, exact, rounded = (torch.cat(part, 1) for part in parts)
    ctx.close("model", got, exact, "keys and values, by layer, token, key or value, and head")
    ctx.no_worse(got, exact, rounded, "keys and values")


@case(3, "output")
def outlives_the_next_step(ctx: Context) -> None:
    """An output does not change when the next step runs, since it may still be on its way to the host."""
    session, kept = ctx.session(), list[tuple[Any, list[int]]]()

    def step(request: ExecuteModelRequest) -> SamplerOutput:
        output = session.execute(session.prepare(request))
        ctx.backend.runtime.synchronize(session.device)
        there = session.fetch(output)
        kept.append((output, there.token_ids.tolist()))
        return there

    drive(step, session.scheduler(), ctx.prompts(9, 4, 20), GREEDY)
    for i, (output, tokens) in enumerate(kept):
        ctx.equal(f"tokens of step {i}, read after the last step", session.fetch(output).token_ids.tolist(), tokens)


@case(3, "output")
def is_there_after_synchronize(ctx: Context) -> None:
    """After synchronize all work is complete: a copy that is read at once equals one that is read later."""
    session = ctx.session()

    def step(request: ExecuteModelRequest) -> SamplerOutput:
        output = session.execute(session.prepare(request))
        ctx.backend.runtime.synchronize(session.device)
        early, late = session.fetch(output), session.fetch(output)
        ctx.equal(f"step {request.step}: tokens", early.token_ids.tolist(), late.token_ids.tolist())
        return early

    ctx.verify(drive(step, session.scheduler(), ctx.prompts(33, 8, 2), GREEDY), "llama", "read after synchronize")


@case(3, "output")
def repeats_itself(ctx: Context) -> None:
    """The same requests on a fresh cache give the same tokens and logprobs, bit for bit."""
    prompts, found = ctx.prompts(20, 3, 11), []
    for _ in range(2):
        session = ctx.session()
        found.append([(r.output, r.logprobs) for r in drive(session.step, session.scheduler(), prompts, GREEDY)])
    ctx.equal("a second run", found[1], found[0])
