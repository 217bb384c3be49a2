"""Penalties for tokens that a sequence already has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from hal.features.declare import Batch, Feature, FeatureState, Fields, StepRows
from hal.features.params import Param, Params
from hal.schema import Array, stays

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st


_MAX = float(np.finfo(np.float32).max)


def _grown(history: torch.Tensor, m: Any, taken: Any) -> torch.Tensor:
    """The history of the next decode step: one column more, and the new token behind the last one."""
    import torch

    n = len(history)
    history = torch.nn.functional.pad(history, (0, 1), value=-1)
    at = m.seq_lens[:n, None].long().clamp(max=history.shape[1] - 1)
    new = torch.where(taken.going[:n, None], taken.token_ids[:n, None], history.gather(1, at))
    return history.scatter(1, at, new)


class PenaltyParams(Params):
    repetition_penalty: Annotated[float, Param(
        help="divides positive logits, and multiplies negative ones, of tokens in prompt or output; 1 is none",
        low=0.0, above=True, column="float32")] = 1.0
    presence_penalty: Annotated[float, Param(help="subtracted from the logits of tokens in the output; 0 is none",
                                             column="float32")] = 0.0
    frequency_penalty: Annotated[float, Param(help="the same for each time a token occurred in the output",
                                              column="float32")] = 0.0


class Penalties(Feature):
    """If one sampled sequence has a penalty, the input carries the whole history of every sampled sequence."""

    params = PenaltyParams
    needs_tokens = True
    fields = {
        "history": Array("int32", "num_sampled", "max_history", low=-1, pad=-1, advance=_grown,
                         doc="all tokens of the sequence so far, for the penalties; -1 behind the last"),
        "prompt_lens": Array("int32", "num_sampled", low=0, doc="how many of `history` are the prompt", advance=stays)}

    def prepare(self, step: StepRows, state: FeatureState | None) -> Fields:
        found = super().prepare(step, state)
        if found:
            rows, of = step.sampled, step.state
            lens = step.positions[step.places] + 1  # drafts before a place belong to its history
            width = int(lens.max())
            found["prompt_lens"] = of.prompt_lens[rows]
            found["history"] = np.where(np.arange(width) < lens[:, None], of.token_ids[rows, :width], -1)
        return found

    def adjust(self, scores: torch.Tensor, model_input: Any) -> torch.Tensor:
        n, m = len(scores), model_input
        return penalised(scores, *(m[name][:n] for name in (*NO_PENALTIES, "history", "prompt_lens")))

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        n = len(batch.lens)
        there = np.arange(max(batch.lens, default=0)) < np.array(batch.lens, np.int64).reshape(-1, 1)
        return {**{name: rng.uniform(0.5, 2, n) for name in NO_PENALTIES},
                "prompt_lens": np.array([rng.integers(1, total + 1) for total in batch.lens], np.int32),
                "history": np.where(there, rng.integers(0, batch.vocab_size, there.shape), -1)}


NO_PENALTIES = {c.name: c.default for c in Penalties.columns}


def penalised(scores: torch.Tensor, repetition: torch.Tensor, presence: torch.Tensor, frequency: torch.Tensor,
              history: torch.Tensor, prompt_lens: torch.Tensor) -> torch.Tensor:
    """fp32 scores [n, vocab] with the penalties applied, a copy; arguments as in the step's input.

    The repetition penalty counts prompt and output (CTRL, arXiv 1909.05858); the presence and frequency penalties count
    the output alone. A finite score stays finite, at most the largest number of fp32. A score that is not finite stays
    as it is, since -inf is a mask.
    """
    import torch

    places = torch.arange(history.shape[1], device=history.device)
    # The places behind the last token repeat the first token, which is written again with the same value.
    ids = torch.where(history < 0, history[:, :1].clamp(min=0), history).long()
    output = (places >= prompt_lens[:, None]) & (history >= 0)
    counts = torch.zeros_like(scores).scatter_add_(1, ids, output.to(scores.dtype)).gather(1, ids)
    old = scores.gather(1, ids)
    repetition, presence, frequency = (column[:, None] for column in (repetition, presence, frequency))
    # Each term is kept finite, since infinities would cancel to NaN.
    new = torch.where(old > 0, old / repetition, old * repetition).clamp(-_MAX, _MAX)
    new = (new - presence * (counts > 0)).clamp(-_MAX, _MAX) - (frequency * counts).clamp(-_MAX, _MAX)
    # A row of padding has no history, so it stays as it is.
    kept = (history[:, :1] < 0) | ~(old.abs() < torch.inf)
    return scores.scatter(1, ids, torch.where(kept, old, new.clamp(-_MAX, _MAX)))
