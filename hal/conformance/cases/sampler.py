"""L2: the sampler (runner.sampler) on given logits, against fp64 and its own rule for random numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hal.conformance.case import case
from hal.conformance.context import Context
from hal.conformance.reference import race
from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.features.masks import mask_fields
from hal.features.penalties import NO_PENALTIES
from hal.sampling.params import SamplingParams
from hal.schema.packed import as_tensor

_VOCAB, _PROMPT = 1009, 5
_ALL = (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.4),
        SamplingParams(temperature=0.9, top_k=1), SamplingParams(temperature=1.5, top_k=40),
        SamplingParams(temperature=1.0, top_p=0.6), SamplingParams(temperature=1.0, top_p=0.97),
        SamplingParams(temperature=2.0, min_p=0.05), SamplingParams(temperature=1.2, top_k=300, top_p=0.9, min_p=0.01),
        SamplingParams(repetition_penalty=1.4), SamplingParams(temperature=0.8, presence_penalty=1.5),
        SamplingParams(temperature=1.0, frequency_penalty=0.7, repetition_penalty=0.8, top_p=0.8))


def _sample(ctx: Context, rows: list[tuple[SamplingParams, int, list[int]]], logits: torch.Tensor,
            num_logprobs: int = -1, masks: dict[int, Any] | None = None) -> SamplerOutput:
    """Sample one step of rows, each given as (parameters, seed, all tokens so far). `masks`: the allowed tokens, by
    row.
    """
    session = ctx.session(warm=False)
    n, longest = len(rows), max(len(h) for _, _, h in rows)
    params = [p for p, _, _ in rows]
    history = np.full((n, longest), -1)
    for i, (_, _, tokens) in enumerate(rows):
        history[i, :len(tokens)] = tokens
    positions = np.array([len(h) - 1 for _, _, h in rows])
    arrays: dict[str, tuple[Any, str]] = {
        "input_ids": (positions * 0, "int32"), "positions": (positions, "int32"),
        "slot_mapping": (positions * 0, "int32"),
        "query_start_loc": (np.arange(n + 1), "int32"), "seq_lens": (positions + 1, "int32"),
        "block_tables": (np.ones((n, 1)), "int32"), "logits_indices": (np.arange(n), "int32")}
    if any(p.temperature for p in params):
        arrays |= {"temperature": ([p.temperature for p in params], "float32"),
                   "seed": ([seed for _, seed, _ in rows], "int64"), "top_k": ([p.top_k for p in params], "int32"),
                   "top_p": ([p.top_p for p in params], "float32"), "min_p": ([p.min_p for p in params], "float32")}
    if any(getattr(p, name) != default for p in params for name, default in NO_PENALTIES.items()):
        arrays |= {name: ([getattr(p, name) for p in params], "float32") for name in NO_PENALTIES}
        arrays |= {"history": (history, "int32"), "prompt_lens": ([_PROMPT] * n, "int32")}
    if any(p.logit_bias for p in params):
        width = max(len(p.logit_bias) for p in params)
        pairs = np.array([[*p.logit_bias, *[(-1, 0.0)] * (width - len(p.logit_bias))] for p in params])
        arrays |= {"bias_ids": (pairs[:, :, 0], "int32"), "bias_values": (pairs[:, :, 1], "float32")}
    if masks is not None:
        free = np.ones(logits.shape[1], np.bool_)
        found = mask_fields({i: masks.get(i, free) for i in range(n)}, logits.shape[1])
        arrays["token_mask"] = found["token_masks"], "int32"
    fields: dict[str, Any] = {k: as_tensor(np.ascontiguousarray(a, dtype), dtype) for k, (a, dtype) in arrays.items()}
    made = PagedModelInput(block_size=64, num_samples=n, num_decode_seqs=n, **fields)
    made.num_logprobs = num_logprobs
    there = PagedModelInput.from_buffer(made.to_buffer(), session.device)
    output: SamplerOutput = ctx.part(session, "sampler")(logits.to(session.device), there)
    ctx.backend.runtime.synchronize(session.device)
    return SamplerOutput.from_buffer(output.to_buffer())


def _rows(ctx: Context, params: tuple[SamplingParams, ...], each: int) -> list[tuple[SamplingParams, int, list[int]]]:
    rng = ctx.rng
    return [(p, int(rng.integers(-2**62, 2**62)), rng.integers(0, _VOCAB, int(rng.integers(6, 40))).tolist())
            for p in params for _ in range(each)]


def _verify(ctx: Context, rows: list[tuple[SamplingParams, int, list[int]]], logits: torch.Tensor,
            masks: dict[int, Any] | None = None) -> list[int]:
    tokens = _sample(ctx, rows, logits, masks=masks).token_ids.tolist()
    for i, mask in (masks or {}).items():
        ctx.check(bool(mask[tokens[i]]), f"{rows[i][0]} gives {tokens[i]}, which the row's mask forbids")
        logits[i] = logits[i].masked_fill(~torch.from_numpy(mask), -torch.inf)
    for (params, seed, history), row, token in zip(rows, logits, tokens, strict=True):
        slack = ctx.tolerances("sampler", ctx.dtype)
        values, sure, possible = race(row.double(), params, seed, len(history), history, _PROMPT, slack)
        best = int(values.masked_fill(~sure, -torch.inf).argmax())
        ctx.check(bool(possible[token]), f"{params} gives {token}, which a filter should have dropped")
        ctx.check(float(values[best] - values[token]) < 3 * slack / (params.temperature or 1.0) + 1e-5,
                  f"{params} gives {token}, which {best} beats by {float(values[best] - values[token]):.3g}")
    return tokens


@case(2, "sampler", "checkpoints")
def greedy(ctx: Context) -> None:
    """The token with the largest logit; of equal ones, the first."""
    logits = ctx.normal(9, _VOCAB, scale=3.0)
    logits[1], logits[2, 77], logits[2, 401] = 0.5, 30.0, 30.0
    tokens = _sample(ctx, _rows(ctx, (SamplingParams(),), 9), logits).token_ids.tolist()
    ctx.equal("greedy tokens", tokens, [int((row == row.max()).nonzero()[0]) for row in logits])


@case(2, "sampler", "checkpoints")
def filters(ctx: Context) -> None:
    """Temperature, top-k, top-p and min-p draw from the tokens that they keep, by the request's seed and position."""
    rows = _rows(ctx, _ALL[:9], 6)
    _verify(ctx, rows, ctx.normal(len(rows), _VOCAB, scale=3.0))


@case(2, "sampler", "checkpoints")
def penalties(ctx: Context) -> None:
    """The repetition penalty counts prompt and output; the presence and frequency penalties count the output alone."""
    rows = _rows(ctx, _ALL[9:], 6)
    logits = ctx.normal(len(rows), _VOCAB, scale=1.0)
    for row, (_, _, history) in zip(logits, rows, strict=True):
        row[torch.tensor(history)] += 2.5  # so that the penalties change the token
    _verify(ctx, rows, logits)


@case(2, "sampler", "checkpoints")
def masks_and_bias(ctx: Context) -> None:
    """A bias changes the logits of the tokens that it names, then a mask leaves the allowed tokens of its row, then
    temperature and filters follow."""
    biased = []
    for params, width in zip(_ALL, (1, 3, 7) * len(_ALL), strict=False):
        tokens = ctx.rng.permutation(_VOCAB)[:width].tolist()
        values = [*ctx.rng.normal(0, 6, width - 1).tolist(), 30.0]
        biased.append(dataclasses.replace(params, logit_bias=tuple(zip(tokens, values, strict=True))))
    rows = _rows(ctx, (*_ALL[:6], *biased), 2)
    masks = {i: ctx.rng.random(_VOCAB) < (0.5, 0.02)[i % 2] for i in range(len(rows)) if i % 3}
    for i, mask in masks.items():
        mask[(i * 31) % _VOCAB] = True
    _verify(ctx, rows, ctx.normal(len(rows), _VOCAB, scale=3.0), masks)


@case(2, "sampler", "checkpoints")
def alone_as_in_a_batch(ctx: Context) -> None:
    """A row's token depends on nothing beside it."""
    rows = _rows(ctx, _ALL, 2)
    order = ctx.rng.permutation(len(rows)).tolist()
    logits = ctx.normal(len(rows), _VOCAB, scale=2.0)
    batch = _verify(ctx, [rows[i] for i in order], logits[order])
    for place, i in enumerate(order[:12]):
        alone = _sample(ctx, [rows[i]], logits[i:i + 1]).token_ids.tolist()[0]
        ctx.equal(f"{rows[i][0]}: alone and in a batch", alone, batch[place])


@case(2, "sampler", "checkpoints")
def logprobs(ctx: Context) -> None:
    """Logprobs of the raw logits: of the token, and of the most likely tokens in their order."""
    rows, logits = _rows(ctx, _ALL, 1), ctx.normal(len(_ALL), _VOCAB, scale=3.0)
    out = _sample(ctx, rows, logits, 4)
    expected = logits.double().log_softmax(-1)
    ctx.check(out.logprobs is not None and out.top_logprobs is not None and out.top_ids is not None, "none came back")
    assert out.logprobs is not None and out.top_logprobs is not None and out.top_ids is not None
    ctx.close("sampler", out.logprobs, expected.gather(1, out.token_ids.long()[:, None])[:, 0], "logprobs")
    ctx.close("sampler", out.top_logprobs, expected.topk(4).values, "the best logprobs")
    given = logits.gather(1, out.token_ids.long()[:, None])
    ranks = None if out.ranks is None else out.ranks.tolist()
    ctx.equal("ranks of the tokens", ranks, ((logits > given).sum(-1) + 1).tolist())
    ctx.close("sampler", expected.gather(1, out.top_ids.long()), expected.topk(4).values, "ids of the best")


@case(2, "sampler", "checkpoints")
def nan_ends_its_row_alone(ctx: Context) -> None:
    """A row without a finite maximum (NaN, infinity, or masks alone) gives the token -1. The rows beside it, and those
    that have masks beside finite logits, give the tokens that they give without it."""
    rows = _rows(ctx, _ALL, 3)
    logits = ctx.normal(len(rows), _VOCAB, scale=3.0)
    logits[::4, ::3] = -torch.inf
    expected = _sample(ctx, rows, logits, 2).token_ids.tolist()
    broken = torch.arange(len(rows)) % 3 == 1
    for i, row in enumerate(broken.nonzero()[:, 0].tolist()):
        at = int(ctx.rng.integers(_VOCAB))
        logits[row, at:at + (1, 1, _VOCAB)[i % 3]] = (torch.nan, torch.inf, torch.nan)[i % 3]
        if i % 4 == 3:
            logits[row] = -torch.inf
    tokens = _sample(ctx, rows, logits, 2).token_ids.tolist()
    for i, (params, _, _) in enumerate(rows):
        ctx.equal(f"{params} in row {i}", tokens[i], -1 if broken[i] else expected[i])


@case(2, "sampler", "checkpoints")
def extreme_temperatures(ctx: Context) -> None:
    """A temperature near 0 gives the largest logit, with every filter, although no quotient by it is finite."""
    kinds: tuple[dict[str, Any], ...] = (
        {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2})
    params = tuple(SamplingParams(temperature=t, **kind) for t in (1e-45, 1e-40, 1.2e-38, 1e-37, 1e-20, 1e-9)
                   for kind in kinds)
    rows = _rows(ctx, params, 1)
    logits = (ctx.normal(len(rows), _VOCAB, scale=3.0) * 8).round() / 8
    logits[torch.arange(len(rows)), torch.from_numpy(ctx.rng.permutation(_VOCAB)[:len(rows)])] = 30.0
    tokens = _sample(ctx, rows, logits).token_ids.tolist()
    for (given, _, history), row, token in zip(rows, logits, tokens, strict=True):
        scores = race(row.double(), replace(given, temperature=0.0), 0, len(history), history, _PROMPT, 0.0)[0]
        ctx.equal(f"{given}", token, int(scores.argmax()))
