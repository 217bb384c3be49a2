"""The logit bias: a request names tokens, and numbers that are added to their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from hal.features.declare import Batch, Feature, FeatureState, Fields, Ints, StepRows, need
from hal.features.params import Param, Params
from hal.schema import Array, stays

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st


MOST_TOKENS = 1024  # entries of one request


class LogitBiasParams(Params):
    logit_bias: Annotated[tuple[tuple[int, float], ...], Param(
        help="added to the logits of these tokens: numbers by token id", low=-1e9, high=1e9, most=MOST_TOKENS)] = ()


class LogitBias(Feature):
    """Sparse: a sequence carries the token ids and numbers that it named, in the order of its parameter."""

    params = LogitBiasParams
    for_sampling = True
    fields = {
        "bias_ids": Array("int32", "num_sampled", "max_bias", low=-1, pad=-1, advance=stays,
                          doc="token ids whose logits are changed; -1 behind the last"),
        "bias_values": Array("float32", "num_sampled", "max_bias", doc="what is added to each",
                             advance=stays)}
    request = {
        "bias_rows": Array("int32", "num_biased", low=0, doc="new rows that have a logit bias"),
        "bias_counts": Array("int32", "num_biased", low=1, doc="tokens that each of them names"),
        "bias_ids": Array("int32", "num_bias", low=0, doc="those tokens, row after row"),
        "bias_values": Array("float32", "num_bias", doc="what is added to the logit of each")}

    def make_state(self, max_rows: int, vocab_size: int) -> BiasState:
        return BiasState(vocab_size)

    def request_fields(self, entered: Sequence[Any]) -> dict[str, np.ndarray[Any, Any]]:
        biased = [s for s in entered if s.params.logit_bias]
        if not biased:
            return {}
        tables = [s.params.logit_bias for s in biased]
        return {"bias_rows": np.array([s.row for s in biased], np.int32),
                "bias_counts": np.array([len(t) for t in tables], np.int32),
                "bias_ids": np.array([i for t in tables for i, _ in t], np.int32),
                "bias_values": np.array([x for t in tables for _, x in t], np.float32)}

    def check_request(self, request: Any, vocab_size: int) -> None:
        rows, counts, ids, values = (request[name] for name in self.request)
        if any(x is None for x in (rows, counts, ids, values)):
            need("bias_rows", rows is counts is ids is values is None, "some arrays", "all arrays or none")
            return
        named = {*rows.tolist()}
        need("bias_rows", named <= {*request.new_rows.tolist()} and len(named) == len(rows), rows,
             "new rows, each once")
        need("bias_counts", bool((counts <= MOST_TOKENS).all()) and int(counts.sum(dtype=np.int64)) == len(ids),
             counts, f"at most {MOST_TOKENS} each, {len(ids)} in all")
        need("bias_ids", not len(ids) or int(ids.max()) < vocab_size, ids, f"below {vocab_size}")
        need("bias_values", bool(np.isfinite(values).all()), values, "finite numbers")

    def renamed(self, request: Any, ids: Ints) -> dict[str, np.ndarray[Any, Any]]:
        return {} if request.bias_ids is None else {"bias_ids": ids[request.bias_ids]}

    def prepare(self, step: StepRows, state: FeatureState | None) -> Fields:
        assert isinstance(state, BiasState)
        if not state.of:
            return {}
        of_rows = [state.of.get(row) for row in step.sampled.tolist()]
        width = max((len(ids) for ids, _ in filter(None, of_rows)), default=0)
        if not width:
            return {}
        ids, values = np.full((len(of_rows), width), -1, np.int32), np.zeros((len(of_rows), width), np.float32)
        for i, of_row in enumerate(of_rows):
            if of_row is not None:
                ids[i, :len(of_row[0])], values[i, :len(of_row[1])] = of_row
        return {"bias_ids": ids, "bias_values": values}

    def adjust(self, scores: torch.Tensor, model_input: Any) -> torch.Tensor:
        ids, values = (model_input[name][:len(scores)] for name in ("bias_ids", "bias_values"))
        return scores.scatter_add(1, ids.clamp(min=0).long(), values.masked_fill(ids < 0, 0.0))

    def restore(self, model_input: Any, i: int) -> dict[str, Any]:
        if not self.present(model_input):
            return {}
        ids, values = model_input["bias_ids"][i].tolist(), model_input["bias_values"][i].tolist()
        return {"logit_bias": [pair for pair in zip(ids, values, strict=True) if pair[0] >= 0]}

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        n, width = len(batch.lens), int(rng.integers(1, 4))
        ids = np.stack([rng.permutation(batch.vocab_size)[:width] for _ in range(n)]) if n else np.zeros((0, width))
        ids = np.where(np.arange(width) < rng.integers(0, width + 1, (n, 1)), ids, -1)
        return {"bias_ids": ids, "bias_values": np.where(ids < 0, 0, rng.normal(0, 5, (n, width)))}


class BiasState:
    """Attributes: of: token ids and values by row, of rows that have a bias."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.of: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}

    def apply(self, request: Any) -> Ints:
        for row in request.new_rows.tolist() if self.of else ():
            self.of.pop(row, None)
        rows: Ints | None = request.bias_rows
        if rows is None:
            return np.zeros(0, np.int32)
        ends = np.cumsum(request.bias_counts)
        for row, count, end in zip(rows.tolist(), request.bias_counts.tolist(), ends.tolist(), strict=True):
            self.of[row] = request.bias_ids[end - count:end].copy(), request.bias_values[end - count:end].copy()
        return rows
