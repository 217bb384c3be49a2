"""Adapters (LoRA, arXiv 2106.09685): a sequence names one, whose low-rank products are added in the linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from hal.features.declare import Batch, Feature, FeatureState, Fields, Ints, StepRows, need
from hal.features.params import Param, Params
from hal.schema import Array, Doc, stays

if TYPE_CHECKING:
    from hypothesis import strategies as st


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter, as the engine knows it.

    Attributes:
        path: of its directory. slot: where the ranks hold it.
        key: begins the addresses of KV blocks that were computed with it, so that no other sequence finds them. Each
            load has a key of its own.
    """

    name: str
    path: str
    slot: int
    key: bytes


# Annotations and defaults of the fields by which a step fills slots, in ExecuteModelRequest and WorkerInput.
LOADS: dict[str, Any] = {
    "adapters_to_load": (Annotated[np.ndarray | None, Array("int32", "num_loads", low=0, doc="slots that get an "
                                                            "adapter before this step")], None),
    "adapter_names": (Annotated[tuple[str, ...], Doc("the name of each")], ()),
    "adapter_paths": (Annotated[tuple[str, ...], Doc("the directory of each, which every rank reads")], ())}


class AdapterParams(Params):
    adapter: Annotated[str | None, Param(help="the adapter (LoRA) of this request, by the name with which it was "
                                              "loaded; `--use-adapter` on the command line", unset="none")] = None


class Adapters(Feature):
    """A request brings the slot of each new row that has an adapter. Every token of a step has the slot of its row,
    since all tokens pass the linear layers, and not only those that are sampled."""

    params = AdapterParams
    fields = {"adapter_slots": Array("int32", "num_tokens", low=-1, pad=-1, advance=stays,
                                     doc="slot of each token's adapter, -1 for none")}
    scalars = {"adapted": (0, Doc("1 where a token has an adapter, which a device may have other programs for"))}
    request = {"adapted_rows": Array("int32", "num_adapted", low=0, doc="new rows that have an adapter"),
               "adapted_slots": Array("int32", "num_adapted", low=0, doc="the slot of each one's")}

    def make_state(self, max_rows: int, vocab_size: int) -> SlotState:
        return SlotState(max_rows)

    def request_fields(self, entered: Sequence[Any]) -> dict[str, np.ndarray[Any, Any]]:
        adapted = [(s.row, s.adapter.slot) for s in entered if s.adapter is not None]
        if not adapted:
            return {}
        rows, slots = np.array(adapted, np.int32).T.copy()
        return {"adapted_rows": rows, "adapted_slots": slots}

    def check_request(self, request: Any, vocab_size: int) -> None:
        rows, slots = request.adapted_rows, request.adapted_slots
        need("adapted_slots", (rows is None) == (slots is None), slots, "a slot for each of adapted_rows")
        if rows is not None:
            need("adapted_rows", {*rows.tolist()} <= {*request.new_rows.tolist()}, rows, "new rows")

    def prepare(self, step: StepRows, state: FeatureState | None) -> Fields:
        assert isinstance(state, SlotState)
        slots = state.slots[step.row_of]
        return {"adapter_slots": slots, "adapted": 1} if (slots >= 0).any() else {}

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        return {"adapter_slots": rng.integers(-1, 4, len(batch.queries))[batch.row_of], "adapted": 1}


class SlotState:
    """Attributes: slots: int32 [max_rows], the slot of each row's adapter; -1 for none."""

    def __init__(self, max_rows: int) -> None:
        self.slots = np.full(max_rows, -1, np.int32)

    def apply(self, request: Any) -> Ints:
        self.slots[request.new_rows] = -1
        if request.adapted_rows is None:
            return np.zeros(0, np.int32)
        self.slots[request.adapted_rows] = request.adapted_slots
        rows: Ints = request.adapted_rows
        return rows
