"""Where a sequence ends within a step of several tokens. The device looks for the end, since the host learns of the
tokens only when the step is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hal.config import MOST_STEPS
from hal.features.declare import Batch, Feature, FeatureState, Fields, Ints, StepRows, need
from hal.schema import Array, stays

if TYPE_CHECKING:
    from hypothesis import strategies as st

STOP_IDS = 8  # a sequence that more tokens may end gets one token a step


class Stopping(Feature):
    """Present in a step that gives its sequences several tokens. A sequence takes no further token behind one of its
    `stop_ids`, or when it has got `max_new` tokens in this step."""

    per_step = True
    together = True
    fields = {
        "max_new": Array("int32", "num_sampled", low=0, advance=stays, doc="most tokens that the sequence gets in this "
                         "step"),
        "stop_ids": Array("int32", "num_sampled", STOP_IDS, low=-1, pad=-1, advance=stays,
                          doc="tokens that end the sequence; -1 behind the last")}
    request = {
        "max_new": Array("int32", "num_seqs", low=1, doc="most tokens that each scheduled row gets in this step"),
        "stop_ids": Array("int32", "num_seqs", STOP_IDS, low=-1, doc="tokens that end each one's sequence, or -1")}

    def check_request(self, request: Any, vocab_size: int) -> None:
        there = request.max_new is not None
        need("num_steps", 1 <= request.num_steps <= MOST_STEPS, request.num_steps, f"1 to {MOST_STEPS}")
        need("stop_ids", there == (request.stop_ids is not None) == (request.num_steps > 1), request.num_steps,
             "max_new and stop_ids exactly where num_steps is above 1")
        if there:
            need("max_new", bool((request.max_new <= request.num_steps).all()), request.max_new,
                 f"at most num_steps ({request.num_steps})")
            need("num_scheduled", bool((request.num_scheduled == 1).all()), request.num_scheduled,
                 "one token of each sequence, since several steps begin with a decode step")

    def renamed(self, request: Any, ids: Ints) -> dict[str, np.ndarray[Any, Any]]:
        stops = request.stop_ids
        return {} if stops is None else {"stop_ids": np.where(stops < 0, stops, ids[stops])}

    def prepare(self, step: StepRows, state: FeatureState | None) -> Fields:
        if step.request.max_new is None:
            return {}
        return {name: step.request[name] for name in self.request}

    def restore_request(self, model_input: Any, rows: Ints) -> dict[str, np.ndarray[Any, Any]]:
        if not self.present(model_input):
            return {}
        return {name: model_input[name][:len(rows)].cpu().numpy() for name in self.request}

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        n = len(batch.lens)
        return {"max_new": rng.integers(1, 5, n), "stop_ids": rng.integers(-1, batch.vocab_size, (n, STOP_IDS))}
