"""The request of a step: the changes that the scheduler tells the workers. It is on the host, and loads no torch."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from hal.errors import InputError
from hal.features import COLUMNS, FOR_SAMPLING, request_annotations
from hal.features.adapter import LOADS
from hal.schema import Array, Declared, Doc

_FLOATS, _INTS = len(COLUMNS["float"]), len(COLUMNS["int"])


class ExecuteModelRequest(Declared, fields=request_annotations() | LOADS):
    """One step, as the differences to the step before. Every rank that prepares keeps a *row* for each running
    sequence, in `hal.paged.batch.BatchState`. A sequence has its row from the step that brings it in (`new_*`) to the
    step that lists the row in `finished_rows`. That step or a later one may give the row to another sequence.

    A rank applies, in this order: finished rows, new rows, appended tokens, block tables. Then it prepares the
    scheduled rows.
    """

    step: Annotated[int, Doc("number of this step in the epoch, from 0")]
    epoch: Annotated[int, Doc("grows when the engine starts over; rows of another epoch are void")] = 0
    digest: Annotated[int, Doc("`chain` over all earlier steps: a rank that missed one disagrees")] = 0

    sampling_follows: Annotated[bool, Doc("a SamplingRequest completes this step after its forward pass has begun; "
                                          "set by the executor")] = False

    num_steps: Annotated[int, Doc("decode steps that the ranks take for this request, one after another; above 1, "
                                  "`rows` have one token each to compute, and blocks for so many")] = 1

    finished_rows: Annotated[np.ndarray, Array("int32", "num_finished", low=0, doc="rows given up before this step")]
    new_rows: Annotated[np.ndarray, Array("int32", "num_new", low=0, doc="rows that sequences enter in")]
    new_lens: Annotated[np.ndarray, Array("int32", "num_new", low=1, doc="tokens known of each (prompt and output)")]
    new_prompt_lens: Annotated[np.ndarray, Array("int32", "num_new", low=1, doc="how many of them are the prompt")]
    new_tokens: Annotated[np.ndarray, Array("int32", "num_new_tokens", low=0, doc="those tokens, one after another")]
    new_floats: Annotated[np.ndarray, Array("float32", "num_new", _FLOATS, doc="hal.features.COLUMNS['float']")]
    new_ints: Annotated[np.ndarray, Array("int64", "num_new", _INTS, doc="hal.features.COLUMNS['int']")]
    append_rows: Annotated[np.ndarray, Array("int32", "num_appended", low=0, doc="rows that gained tokens")]
    append_tokens: Annotated[np.ndarray, Array("int32", "num_appended_tokens", low=-1,
                                               doc="these tokens, row after row; PENDING_TOKEN where the rank has it")]
    append_counts: Annotated[np.ndarray | None, Array("int32", "num_appended", low=1,
                                                      doc="how many each row gained; absent: one each")] = None
    block_rows: Annotated[np.ndarray, Array("int32", "num_block_rows", low=0, doc="rows whose block table changes")]
    block_starts: Annotated[np.ndarray, Array("int32", "num_block_rows", low=0, doc="first column that changes")]
    block_counts: Annotated[np.ndarray, Array("int32", "num_block_rows", low=0, doc="how many; the rest is cleared")]
    new_blocks: Annotated[np.ndarray, Array("int32", "num_new_blocks", low=1, doc="the block ids, row after row")]

    rows: Annotated[np.ndarray, Array("int32", "num_seqs", low=0,
                                      doc="scheduled rows; those with one token to compute come first")]
    num_scheduled: Annotated[np.ndarray, Array("int32", "num_seqs", low=1, doc="tokens of each to compute")]
    num_computed: Annotated[np.ndarray, Array("int32", "num_seqs", low=0, doc="tokens of each already in the cache")]
    draft_counts: Annotated[np.ndarray | None, Array("int32", "num_seqs", low=0, doc="how many of the scheduled tokens "
                                                     "are drafts, the last ones; absent: none")] = None
    draft_tokens: Annotated[np.ndarray | None, Array("int32", "num_drafts", low=0,
                                                     doc="these drafts, row after row")] = None
    num_proposals: Annotated[int, Doc("tokens that a proposer on the ranks gives each sampled sequence after this "
                                      "step")] = 0

    blocks_to_copy: Annotated[np.ndarray | None, Array("int32", "num_copies", 2, low=1)] = None
    blocks_to_swap_in: Annotated[np.ndarray | None, Array("int32", "num_swaps_in", 2, low=0)] = None
    blocks_to_swap_out: Annotated[np.ndarray | None, Array("int32", "num_swaps_out", 2, low=0)] = None
    rows_to_swap_in: Annotated[np.ndarray | None, Array("int32", "num_rows_in", 2, low=0, doc="where layers keep a "
                                                        "state per row: row on the host, row")] = None
    rows_to_swap_out: Annotated[np.ndarray | None, Array("int32", "num_rows_out", 2, low=0, doc="row, row on the host"
                                                         )] = None

    def join(self, sampling: SamplingRequest) -> None:
        """Take the arrays of the second message. Then this equals the request of a step in one phase."""
        self.sampling_follows = False
        for feature in FOR_SAMPLING:
            for name in feature.request:
                if sampling[name] is not None:
                    setattr(self, name, sampling[name])

    def chain(self) -> int:
        """The digest that the next step must carry: CRC-32 of this step's rows, tokens and blocks, over `digest`."""
        step = f"{self.epoch} {self.step}" if self.num_steps == 1 else f"{self.epoch} {self.step} {self.num_steps}"
        crc = zlib.crc32(step.encode(), self.digest)
        for array in (self.finished_rows, self.new_tokens, self.append_tokens, self.new_blocks, self.rows,
                      self.num_scheduled, self.num_computed):
            if len(array):
                crc = zlib.crc32(array.data, crc)
        if self.draft_tokens is not None:
            crc = zlib.crc32(self.draft_tokens.data, crc)
        return crc if self.append_counts is None else zlib.crc32(self.append_counts.data, crc)

    def check(self) -> None:
        """Semantic check (HAL_STRICT=1, recordings): there is a token for each row that gained one, and a draft for
        each place of one. Raises InputError."""
        super().check()
        drafts = 0 if self.draft_counts is None else int(self.draft_counts.sum(dtype=np.int64))
        if drafts != (0 if self.draft_tokens is None else len(self.draft_tokens)):
            raise InputError("ExecuteModelRequest.draft_tokens is inconsistent", fields=("draft_tokens",),
                             got="none" if self.draft_tokens is None else f"{len(self.draft_tokens)} tokens",
                             expected=f"{drafts} for the rows")
        counts = self.append_counts
        total = len(self.append_rows) if counts is None else int(counts.sum(dtype=np.int64))
        if total != len(self.append_tokens):
            raise InputError("ExecuteModelRequest.append_tokens is inconsistent", fields=("append_tokens",),
                             got=f"{len(self.append_tokens)} tokens", expected=f"{total} for the rows")


class SamplingRequest(Declared, fields=request_annotations(FOR_SAMPLING)):
    """The second message of a step in two phases: the arrays that only sampling needs, so that an engine may compute
    them while the device runs the forward pass. They are the arrays of the features that declare `for_sampling`, with
    the same meaning as in ExecuteModelRequest."""

    step: Annotated[int, Doc("number of the step that it completes")]

    @classmethod
    def of(cls, request: ExecuteModelRequest, columns: Mapping[str, Any], vocab_size: int) -> SamplingRequest:
        """The second message of `request`, checked. `columns`: arrays by the names of this class's fields.

        Raises:
            InputError: a name or an array that the features do not declare, or one that `request` brought already.
        """
        for feature in FOR_SAMPLING:
            both = [name for name in feature.request if name in columns]
            if both and any(request[name] is not None for name in feature.request):
                raise InputError(f"step {request.step} has its {type(feature).__name__} already", got=both,
                                 expected="the arrays of a feature in one of a step's two messages", fields=(*both,))
        unknown = sorted(columns.keys() - {name for feature in FOR_SAMPLING for name in feature.request})
        if unknown:
            raise InputError("sampling has no such array", got=unknown, fields=(*unknown,), expected=", ".join(
                name for feature in FOR_SAMPLING for name in feature.request), hint="other arrays belong to the "
                "request with which the step is submitted")
        made = cls(step=request.step, **columns)
        made.validate()
        joined = copy.copy(request)
        joined.join(made)
        for feature in FOR_SAMPLING:
            if not columns.keys().isdisjoint(feature.request):
                feature.check_request(joined, vocab_size)
        return made
