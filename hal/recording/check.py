"""The check of recorded requests: each row, length, block and parameter, before anything is executed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hal.config import EngineConfig
from hal.contracts.inputs import PagedModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.errors import InputError, StateError, WireError
from hal.features import COLUMNS, FEATURES
from hal.features.declare import need
from hal.model_config import ModelConfig
from hal.paged.batch import BatchState

_INT32 = 2**31 - 1
_SCALARS = {"step": 2**63 - 1, "epoch": 2**63 - 1, "digest": 2**32 - 1}


def inputs_of(requests: Sequence[ExecuteModelRequest], engine: EngineConfig, model: ModelConfig, *,
              paged: bool = True) -> list[PagedModelInput] | list[None]:
    """The inputs that the requests, in this order, mean to an engine with these limits (num_blocks=None: any block).

    Args:
        paged: False for a runner whose input is not a paged one: then the requests alone are checked, and each means
            None.

    Raises:
        WireError: a request names a row, a token, a block or a length that the engine does not have, has a sampling
            parameter out of range, or does not follow from those before it.
    """
    state = BatchState(engine.max_num_seqs, engine.longest_sequence(model), engine.block_size,
                       model.vocab_size)
    found = list[Any]()
    for i, request in enumerate(requests):
        try:
            _check(state, request, engine, first=not i)
            state.apply(request)
            made = state.prepare(request).to() if paged else None
            if made is not None:
                made.check()
        except (InputError, StateError) as error:
            raise WireError(f"step {i} of the recording cannot be run: {error}") from None
        found.append(made)
    return found


def _check(state: BatchState, r: ExecuteModelRequest, engine: EngineConfig, first: bool) -> None:
    """Check all assumptions that applying and preparing the request make. Raises InputError."""
    r.check()
    for name, most in _SCALARS.items():
        need(name, 0 <= r[name] <= most, r[name], f"0 to {most}")
    need("epoch", first or r.epoch == state.epoch, r.epoch, f"{state.epoch}, as in the step before")
    lens, tables = state.num_tokens.copy(), state.num_blocks.copy()
    _rows("finished_rows", r.finished_rows, lens)
    lens[r.finished_rows] = 0
    _rows("new_rows", r.new_rows, lens, live=False)
    _check_new(r, state.token_ids.shape[1], state.vocab_size)
    lens[r.new_rows], tables[r.new_rows] = r.new_lens, 0
    for feature in FEATURES:
        feature.check_request(r, state.vocab_size)
    _adapters(r, engine.max_adapters)
    _rows("append_rows", r.append_rows, lens)
    _within("append_tokens", r.append_tokens, 0, state.vocab_size - 1)
    lens[r.append_rows] += 1 if r.append_counts is None else r.append_counts
    _within("append_rows", lens[r.append_rows], 1, state.token_ids.shape[1])
    _rows("block_rows", r.block_rows, lens)
    _sum("block_counts", r.block_counts, len(r.new_blocks))
    need("block_starts", bool((r.block_starts <= tables[r.block_rows]).all()), r.block_starts,
          "at most the blocks that the row has")
    ends = r.block_starts.astype(np.int64) + r.block_counts
    _within("block_counts", ends, 0, state.block_tables.shape[1])
    blocks = (engine.num_blocks or _INT32 + 1) - 1
    _within("new_blocks", r.new_blocks, 1, blocks)
    _rows("rows", r.rows, lens)
    need("rows", len(r.rows) > 0, "none", "at least one row to compute")
    reached = r.num_computed.astype(np.int64) + r.num_scheduled
    if r.draft_counts is not None and r.draft_tokens is not None:
        drafts = r.draft_counts.astype(np.int64)
        _within("draft_tokens", r.draft_tokens, 0, state.vocab_size - 1)
        need("draft_counts", bool((drafts < r.num_scheduled).all()), drafts, f"below num_scheduled {r.num_scheduled}")
        _within("draft_counts", reached, 1, state.token_ids.shape[1])
        reached = reached - drafts
        need("draft_counts", bool((reached == lens[r.rows])[drafts > 0].all()), drafts, "drafts behind a row's last "
             "token alone")
    need("num_scheduled", bool((reached <= lens[r.rows]).all()), reached, f"at most the rows' tokens {lens[r.rows]}")
    if (most := r["max_new"]) is not None:  # each further decode step writes a slot
        tables[r.block_rows] = ends
        places = (tables[r.rows] * engine.block_size).clip(max=state.token_ids.shape[1])
        need("max_new", bool((reached + most - 1 <= places).all()), most,
             f"at most {places - reached + 1}, for which the rows have blocks")
    _within("num_scheduled", r.num_scheduled.sum(dtype=np.int64), 1, engine.max_num_batched_tokens)
    _moves("blocks_to_copy", r.blocks_to_copy, (1, blocks), (1, blocks))
    _moves("blocks_to_swap_in", r.blocks_to_swap_in, (0, engine.num_cpu_blocks - 1), (1, blocks))
    _moves("blocks_to_swap_out", r.blocks_to_swap_out, (1, blocks), (0, engine.num_cpu_blocks - 1))
    for name in ("rows_to_swap_in", "rows_to_swap_out"):
        _moves(name, r[name], (0, len(lens) - 1), (0, len(lens) - 1))


def _check_new(r: ExecuteModelRequest, max_model_len: int, vocab_size: int) -> None:
    _within("new_lens", r.new_lens, 1, max_model_len)
    _sum("new_lens", r.new_lens, len(r.new_tokens))
    need("new_prompt_lens", bool((r.new_prompt_lens <= r.new_lens).all()), r.new_prompt_lens,
          f"at most new_lens {r.new_lens}")
    _within("new_tokens", r.new_tokens, 0, vocab_size - 1)
    for kind, columns in COLUMNS.items():
        for i, column in enumerate(columns):
            _within(f"new_{kind}s ({column.name})", r[f"new_{kind}s"][:, i], column.low, column.high)


def _within(field: str, values: np.ndarray[Any, Any] | np.integer[Any], low: float, high: float) -> None:
    need(field, bool(((values >= low) & (values <= high)).all()), values, f"{low} to {high}")  # false for NaN


def _sum(field: str, counts: np.ndarray[Any, Any], expected: int) -> None:
    total = int(counts.sum(dtype=np.int64))
    need(field, total == expected, f"{total} in all", f"{expected}, which are there")


def _rows(field: str, rows: np.ndarray[Any, Any], lens: np.ndarray[Any, Any], live: bool = True) -> None:
    """Check rows: each exists, is named once, and holds a sequence, or holds none."""
    _within(field, rows, 0, len(lens) - 1)
    need(field, len(np.unique(rows)) == len(rows), rows, "each row once")
    need(field, bool(((lens[rows] > 0) == live).all()), rows,
          "rows that hold a sequence" if live else "rows that are free")


def _adapters(r: ExecuteModelRequest, slots: int) -> None:
    count, names = 0 if r["adapters_to_load"] is None else len(r["adapters_to_load"]), r["adapter_names"]
    need("adapter_names", len(names) == len(r["adapter_paths"]) == count, names, f"{count} texts")
    for name in ("adapters_to_load", "adapted_slots"):
        if r[name] is not None:
            _within(name, r[name], 0, slots - 1)


def _moves(field: str, pairs: np.ndarray[Any, Any] | None, source: tuple[int, int], into: tuple[int, int]) -> None:
    if pairs is not None:
        _within(field, pairs[:, 0], *source)
        _within(field, pairs[:, 1], *into)
        need(field, len(np.unique(pairs[:, 1])) == len(pairs), pairs[:, 1], "nothing written twice")
