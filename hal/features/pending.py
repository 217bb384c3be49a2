"""Pending tokens: sampled tokens that stay on the device. Under asynchronous scheduling the host prepares a sequence's
next step before it knows the token that the step begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hal.features.declare import Batch, Feature, FeatureState, Fields, StepRows
from hal.schema import Array, stays

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

PENDING_TOKEN = -1  # an appended token that is still on the device: the one that the row sampled last


def _none(pending_rows: torch.Tensor, m: Any, taken: Any) -> torch.Tensor:
    """No token of the next decode step is pending: `input_ids` has what this step sampled."""
    return pending_rows.new_full(m.seq_lens.shape, -1)


class Pending(Feature):
    """`hal.paged.pending.PendingTokens` keeps the tokens on the device."""

    always, together = True, False
    fields = {
        "pending_rows": Array("int32", "num_tokens", low=-1, pad=-1, doc="row whose last sampled token is this one, "
                              "not yet known on the host; else -1", advance=_none),
        "sampled_rows": Array("int32", "num_sampled", low=-1, pad=-1, doc="row of each sampled sequence",
                              advance=stays)}

    def prepare(self, step: StepRows, state: FeatureState | None) -> Fields:
        if not step.state.asynchronous:
            return {}
        found: Fields = {"sampled_rows": step.sampled}
        pending = step.input_ids == PENDING_TOKEN
        if np.count_nonzero(pending):
            found["pending_rows"] = np.where(pending, step.row_of, -1)
            step.input_ids = np.where(pending, 0, step.input_ids)
        return found

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        """A batch in which sequence i has row i, and a decode may begin with any pending token."""
        decodes = np.array(batch.queries, np.int64)[batch.row_of] == 1
        return {"sampled_rows": np.array(batch.sampled, np.int64),
                "pending_rows": np.where(decodes & (rng.random(len(batch.row_of)) < 0.5), batch.row_of, -1)}
