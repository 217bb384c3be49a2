"""Logprobs of tokens, of the raw logits before any parameter changed them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from hal.features.declare import Batch, Feature, FeatureState, Fields, StepRows
from hal.features.params import Param, Params
from hal.schema import Array, Doc

if TYPE_CHECKING:
    from hypothesis import strategies as st

MOST = 1000  # a request may ask for at most so many most likely tokens


class LogprobParams(Params):
    logprobs: Annotated[int | None, Param(
        help="report each output token's logprob and rank, and this many most likely tokens beside it", low=0,
        high=MOST, column="int32", unset="none")] = None
    prompt_logprobs: Annotated[int | None, Param(help="the same for each prompt token after the first", low=0,
                                                 high=MOST, column="int32", unset="none")] = None


class Logprobs(Feature):
    """A step reports the largest number that one of its sequences asked for. The engine cuts each sequence's logprobs
    to the number that the sequence asked for."""

    params = LogprobParams
    column_fields = False
    fields = {"prompt_targets": Array("int32", "num_targets", low=0, doc="the token whose logprob is wanted, for the "
                                      "rows of logits_indices behind the sampled ones",
                                      advance=lambda value, m, taken: None)}
    scalars = {"num_logprobs": (-1, Doc("most likely tokens to report beside each sampled one; -1: no logprobs")),
               "num_prompt_logprobs": (-1, Doc("the same for prompt tokens",
                                             advance=lambda value, m, taken: -1))}

    def prepare(self, step: StepRows, state: FeatureState | None) -> Fields:
        found: Fields = {"num_logprobs": int(step.column("logprobs").max(initial=-1))}
        rows, positions = step.row_of, step.positions
        asked = step.state.column("prompt_logprobs", rows)
        wanted = np.flatnonzero((asked >= 0) & (positions + 1 < step.state.prompt_lens[rows]))
        if len(wanted):
            step.targets = wanted
            found["prompt_targets"] = step.state.token_ids[rows[wanted], positions[wanted] + 1]
            found["num_prompt_logprobs"] = int(asked[wanted].max())
        return found

    def restore(self, model_input: Any, i: int) -> dict[str, Any]:
        return {"logprobs": model_input["num_logprobs"]} if model_input["num_logprobs"] >= 0 else {}

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        found: Fields = {name: int(rng.integers(-1, 4)) for name in self.scalars}
        if batch.num_targets:
            found["prompt_targets"] = rng.integers(0, batch.vocab_size, batch.num_targets)
        return found
