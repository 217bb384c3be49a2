"""Requests made by hand, and the smallest schedule that drives a runner with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest
from hal.features import COLUMNS

GREEDY = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
          "frequency_penalty": 0.0, "top_k": 0, "seed": 3, "logprobs": -1, "prompt_logprobs": -1}


@dataclass
class Seq:
    row: int
    tokens: list[int]
    prompt: int
    params: dict[str, float]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)


def numbers(kind: str, params: Sequence[Mapping[str, float]]) -> np.ndarray:
    """A request's new_floats or new_ints; what is not given has its default."""
    dtype = np.float32 if kind == "float" else np.int64
    return np.array([[p.get(c.name, c.default) for c in COLUMNS[kind]] for p in params],
                    dtype).reshape(-1, len(COLUMNS[kind]))


def request(step: int, digest: int, epoch: int = 0, finished: Sequence[int] = (), new: Sequence[Seq] = (),
            appended: Sequence[tuple[int, int]] = (), blocks: Sequence[tuple[int, int, list[int]]] = (),
            run: Sequence[tuple[Seq, int]] = ()) -> ExecuteModelRequest:
    """blocks: (row, first column, ids). run: (sequence, tokens to compute)."""
    def ints(values: Any) -> np.ndarray:
        return np.array(list(values), np.int32)

    return ExecuteModelRequest(
        step=step, digest=digest, epoch=epoch, finished_rows=ints(finished), new_rows=ints(s.row for s in new),
        new_lens=ints(len(s.tokens) for s in new), new_prompt_lens=ints(s.prompt for s in new),
        new_tokens=ints(t for s in new for t in s.tokens),
        new_floats=numbers("float", [s.params for s in new]), new_ints=numbers("int", [s.params for s in new]),
        append_rows=ints(r for r, _ in appended), append_tokens=ints(t for _, t in appended),
        block_rows=ints(r for r, _, _ in blocks), block_starts=ints(c for _, c, _ in blocks),
        block_counts=ints(len(b) for _, _, b in blocks), new_blocks=ints(b for _, _, bs in blocks for b in bs),
        rows=ints(s.row for s, _ in run), num_scheduled=ints(q for _, q in run),
        num_computed=ints(s.computed for s, _ in run))


def generate(runner: Any, caches: Sequence[torch.Tensor], prompts: list[list[int]], count: int, *, budget: int,
             params: dict[str, float] | None = None, apart: int = 1) -> list[Seq]:
    """`count` tokens after each prompt, whose sequences enter `apart` steps after one another, while a step computes at
    most `budget` tokens. Blocks are handed out in no order. Sequences carry what the sampler said of each token."""
    seqs = [Seq(row, list(p), len(p), GREEDY | (params or {})) for row, p in enumerate(prompts)]
    size = runner.config.engine.block_size
    pool = np.random.default_rng(7).permutation(np.arange(1, caches[0].shape[1])).tolist()
    appended: list[tuple[int, int]] = []
    step = digest = 0
    while any(len(s.tokens) < s.prompt + count for s in seqs):
        new = [seqs[step // apart]] if step % apart == 0 and step // apart < len(seqs) else []
        entered = seqs[:step // apart + 1]
        run, left = [], budget
        for s in sorted(entered, key=lambda s: len(s.tokens) - s.computed):
            queries = min(len(s.tokens) - s.computed, left)
            if queries and len(s.tokens) < s.prompt + count:
                run.append((s, queries))
                left -= queries
        run.sort(key=lambda pair: pair[1] != 1)
        blocks = []
        for s, queries in run:
            fresh = [pool.pop() for _ in range(-(-(s.computed + queries) // size) - len(s.blocks))]
            blocks += [(s.row, len(s.blocks), fresh)] if fresh else []
            s.blocks += fresh
        r = request(step, digest, new=new, appended=appended, blocks=blocks, run=run)
        model_input = runner.prepare_model_input(r)
        model_input.validate(runner.device)
        model_input.check()
        output = runner.execute_model(model_input, caches)
        output.validate(runner.device)
        appended = _take(output, run)
        step, digest = step + 1, r.chain()
    return seqs


def _take(output: SamplerOutput, run: list[tuple[Seq, int]]) -> list[tuple[int, int]]:
    appended, row, target = [], 0, 0
    for s, queries in run:
        if s.params["prompt_logprobs"] >= 0:
            for _ in range(s.computed, min(s.computed + queries, s.prompt - 1)):
                assert output.prompt_logprobs is not None
                s.outputs.append({"prompt": float(output.prompt_logprobs[target])})
                target += 1
        s.computed += queries
        if s.computed == len(s.tokens):
            s.tokens.append(int(output.token_ids[row]))
            appended.append((s.row, s.tokens[-1]))
            if output.logprobs is not None:
                s.outputs.append({"logprob": float(output.logprobs[row])})
            row += 1
    assert row == len(output.token_ids)
    return appended
