"""hal's SamplerOutput as vLLM's ModelRunnerOutput."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, ModelRunnerOutput

from hal.contracts.outputs import SamplerOutput
from hal_vllm.rows import Step
from hal_vllm.translate import Translator


def take_output(translator: Translator, step: Step, output: SamplerOutput) -> ModelRunnerOutput:
    """Take a step's tokens over, and give them to vLLM. Outputs come in the order of the steps."""
    tokens, sampled = output.token_ids.numpy(), step.sampled
    invalid = None
    if tokens.min(initial=0) < 0:
        tokens = tokens.copy()
        invalid = {step.req_ids[i]: 1 for i in _places(step)[tokens < 0].tolist()}
        tokens[tokens < 0] = 0  # vLLM has no token that says there is none; num_nans_in_logits tells the user
    translator.take(step, tokens)
    if sampled is None:
        token_lists = tokens.reshape(-1, 1).tolist()
    else:
        token_lists = [[] for _ in step.req_ids]
        for i, token in zip(sampled.tolist(), tokens.tolist(), strict=True):
            token_lists[i] = [token]
    logprobs = None if output.logprobs is None else _logprobs(step, tokens, output)
    prompt = _prompt_logprobs(step, output) if step.targets or translator.special else {}
    return ModelRunnerOutput(req_ids=step.req_ids, req_id_to_index=step.index, sampled_token_ids=token_lists,
                             logprobs=logprobs, prompt_logprobs_dict=prompt, num_nans_in_logits=invalid)


def _places(step: Step) -> np.ndarray:
    return np.arange(len(step.req_ids)) if step.sampled is None else step.sampled


def _logprobs(step: Step, tokens: np.ndarray, output: SamplerOutput) -> LogprobsLists:
    """One row for each scheduled request; the rows of requests without a token are not read."""
    ids, values, ranks = _columns(tokens, output.logprobs, output.ranks, output.top_ids, output.top_logprobs)
    if step.sampled is None:
        return LogprobsLists(ids, values, ranks)
    count = len(step.req_ids)
    every = (np.zeros((count, ids.shape[1]), np.int32), np.zeros((count, ids.shape[1]), np.float32),
             np.zeros(count, np.int32))
    for all_rows, some in zip(every, (ids, values, ranks), strict=True):
        all_rows[step.sampled] = some
    return LogprobsLists(*every)


def _prompt_logprobs(step: Step, output: SamplerOutput) -> dict[str, LogprobsTensors | None]:
    """Keep the chunks that came with this step. vLLM takes a prompt's logprobs whole, with the first token."""
    at = 0
    for request, first, end in step.targets:
        part = slice(at, at + end - first)
        at = part.stop
        chosen, ranks, top_ids, top = (None if tensor is None else tensor[part] for tensor in (
            output.prompt_logprobs, output.prompt_ranks, output.prompt_top_ids, output.prompt_top_logprobs))
        request.prompt_parts.append(_columns(np.array(request.tokens[first:end]), chosen, ranks, top_ids, top,
                                             request.prompt_logprobs))
    done: dict[str, LogprobsTensors | None] = {}
    for i in _places(step).tolist():
        request = step.owners[i]
        if request.prompt_parts:
            done[request.req_id] = LogprobsTensors(*(torch.from_numpy(np.concatenate(columns))
                                                     for columns in zip(*request.prompt_parts, strict=True)))
            request.prompt_parts = []
    return done


def _columns(tokens: np.ndarray, chosen: Any, ranks: Any, top_ids: Any, top: Any,
             most: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """vLLM's form: the given token first, then the most likely ones, at most `most`; and the given token's rank."""
    ids, values = tokens.astype(np.int32)[:, None], chosen.numpy()[:, None]
    if top_ids is not None and most != 0:
        ids, values = np.hstack((ids, top_ids.numpy()[:, :most])), np.hstack((values, top.numpy()[:, :most]))
    return ids, values, ranks.numpy()
