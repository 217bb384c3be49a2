"""A step that the scheduler has issued, and the ExecuteModelRequest that tells the workers about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from hal.contracts.executor import StepHandle
from hal.contracts.request import ExecuteModelRequest
from hal.engine.sequence import Sequence
from hal.errors import StateError
from hal.features import COLUMNS, FEATURES
from hal.features.adapter import Adapter
from hal.features.masks import mask_fields

# Most steps change nothing here. Making eight empty arrays would take as long as making the rest of a request.
_NONE = np.zeros(0, np.int32)
_NO_FLOATS = np.zeros((0, len(COLUMNS["float"])), np.float32)
_WITH_ARRAYS = tuple(f for f in FEATURES if f.request)
_NO_INTS = np.zeros((0, len(COLUMNS["int"])), np.int64)


@dataclass(slots=True)
class ScheduledStep:
    """A step that the scheduler has issued and that the executor runs.

    Attributes:
        rows: all rows that the step computes. sampled_rows, sampled: the rows and sequences that get a token, in the
            order of SamplerOutput. gains: the most tokens that each of these gets, int [num_sampled]; None: one each.
        prompt_targets: (sequence, first, end) of each sequence whose prompt logprobs come with this step, in the order
            of SamplerOutput: one for each prompt token from `first` to before `end`.
        num_tokens, num_prefill: tokens that the step computes, and how many of them belong to prefill.
        drafts: of each row with drafts, their number.
    """

    request: ExecuteModelRequest
    rows: np.ndarray
    sampled_rows: np.ndarray
    sampled: list[Sequence]
    gains: np.ndarray | None
    prompt_targets: list[tuple[Sequence, int, int]]
    num_tokens: int
    num_prefill: int
    drafts: dict[int, int] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Decode steps that the ranks take for this step's message."""
        return self.request.num_steps

    def draft_tokens(self) -> list[list[int]]:
        """The drafts of each of `sampled`."""
        counts = [self.drafts.get(row, 0) for row in self.sampled_rows.tolist()]
        given = iter(() if self.request.draft_tokens is None else self.request.draft_tokens.tolist())
        return [list(islice(given, count)) for count in counts]

    def restrict(self, masks: Mapping[int, np.ndarray], vocab_size: int, handle: StepHandle | None = None) -> None:
        """Say which tokens sequences may get from this step, before it is executed; or, with the handle of a step that
        was submitted with sampling_follows, while its forward pass runs: then its sampling begins with these masks.

        Under asynchronous scheduling a mask that is given before the step is executed would have to be known before
        its sequence's last token, so such a sequence needs `Sequence.needs_tokens`. One that is given with the handle
        does not.

        Args:
            masks: bool [vocab_size] by request_id, for sequences in `sampled`; other sequences are not restricted. Of a
                sequence with drafts (see `drafts`), bool [1 + drafts, vocab_size]: the mask behind its last token, and
                behind each draft. Sequence.max_drafts = 0 keeps a sequence without drafts. Instead of bool, all may be
                bits: see `mask_fields`.

        Raises:
            StateError: a request is not sampled in this step, or lacks a mask for one of its places; or as
                `StepHandle.sample`. InputError, WorkerError: as `StepHandle.sample`.
        """
        rows = dict(zip((seq.request_id for seq in self.sampled), self.sampled_rows.tolist(), strict=True))
        if self.num_steps > 1:
            raise StateError("a mask is given for a step that gives its sequences several tokens",
                             got=f"num_steps={self.num_steps}", expected="a step of one token",
                             hint="set Sequence.needs_tokens for sequences that get masks, or steps_per_message=1")
        if not masks.keys() <= rows.keys():
            raise StateError("a mask is given for a request that this step does not sample",
                             got=sorted(masks.keys() - rows.keys()), expected=f"some of {sorted(rows)}")
        for i, mask in masks.items():
            places = 1 + self.drafts.get(rows[i], 0)
            if np.atleast_2d(mask).shape[0] != places:
                raise StateError("a sequence with drafts needs a mask for each of its places",
                                 got=f"request {i}: a mask of shape {list(mask.shape)}",
                                 expected=f"{[places, vocab_size]}",
                                 hint="request.draft_tokens has the drafts; Sequence.max_drafts = 0 proposes none")
        fields = mask_fields({rows[i]: mask for i, mask in masks.items()}, vocab_size)
        if handle is not None:
            handle.sample(fields)
            return
        for name, array in fields.items():
            setattr(self.request, name, array)


@dataclass(slots=True)
class Changes:
    """The changes that the next request carries, beside the rows that it computes. Pairs are (source block,
    destination block).

    Attributes:
        rows_out, rows_in: (row, row on the host) and the other way round of each state that is swapped.
        finished: rows that sequences have left. entered: sequences that have entered rows. grown: (row, column, block)
            of each block that a running sequence was given. loads: adapters that slots get.
    """

    finished: list[int] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    rows_out: list[tuple[int, int]] = field(default_factory=list)
    rows_in: list[tuple[int, int]] = field(default_factory=list)
    entered: list[Sequence] = field(default_factory=list)
    grown: list[tuple[int, int, int]] = field(default_factory=list)
    loads: list[Adapter] = field(default_factory=list)

    def request(self, rows: np.ndarray, counts: np.ndarray, computed: np.ndarray, append_rows: np.ndarray,
                append_tokens: np.ndarray, append_counts: np.ndarray | None = None,
                **values: Any) -> ExecuteModelRequest:
        """Args: rows, counts, computed: int [num_seqs]. append_rows: int [num_appended].
            append_tokens, append_counts: see ExecuteModelRequest."""
        new = self.entered
        grown_rows, columns, blocks = map(list, zip(*self.grown, strict=True)) if self.grown else ([], [], [])
        of_features: dict[str, Any] = {}
        for feature in _WITH_ARRAYS if new else ():
            of_features |= feature.request_fields(new)
        if self.loads:
            values |= {"adapters_to_load": _ints([a.slot for a in self.loads]),
                       "adapter_names": tuple(a.name for a in self.loads),
                       "adapter_paths": tuple(a.path for a in self.loads)}
        return ExecuteModelRequest(
            finished_rows=_ints(self.finished), new_rows=_ints([s.row for s in new]),
            new_lens=_ints([len(s) for s in new]), new_prompt_lens=_ints([len(s.prompt_ids) for s in new]),
            new_tokens=_ints([t for s in new for t in s.token_ids]),
            new_floats=np.array([s.numbers(COLUMNS["float"]) for s in new], np.float32) if new else _NO_FLOATS,
            new_ints=np.array([s.numbers(COLUMNS["int"]) for s in new], np.int64) if new else _NO_INTS,
            append_rows=append_rows.astype(np.int32), append_tokens=append_tokens.astype(np.int32),
            append_counts=None if append_counts is None else append_counts.astype(np.int32),
            block_rows=_ints([s.row for s in new] + grown_rows),
            block_starts=_ints([0] * len(new) + columns),
            block_counts=_ints([len(s.blocks) for s in new] + [1] * len(blocks)),
            new_blocks=_ints([b for s in new for b in s.blocks] + blocks),
            rows=rows.astype(np.int32), num_scheduled=counts.astype(np.int32), num_computed=computed.astype(np.int32),
            blocks_to_copy=_pairs(self.copies), blocks_to_swap_in=_pairs(self.swap_in),
            blocks_to_swap_out=_pairs(self.swap_out), rows_to_swap_in=_pairs(self.rows_in),
            rows_to_swap_out=_pairs(self.rows_out), **of_features, **values)


def _ints(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32) if values else _NONE


def _pairs(pairs: list[tuple[int, int]]) -> np.ndarray | None:
    return np.array(pairs, np.int32) if pairs else None
