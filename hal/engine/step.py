"""One step as the scheduler sees it, and the request that it sends."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hal.engine.sequence import Sequence
from hal.request import FLOAT_PARAMS, INT_PARAMS, ExecuteModelRequest

# Most steps bring nothing new, and making eight empty arrays takes as long as what they carry.
_NONE = np.zeros(0, np.int32)
_NO_FLOATS = np.zeros((0, len(FLOAT_PARAMS)), np.float32)
_NO_INTS = np.zeros((0, len(INT_PARAMS)), np.int64)


@dataclass(slots=True)
class Step:
    """A step to run.

    Attributes:
        rows: all rows it computes. sampled_rows, sampled: those that get a token, in the order of SamplerOutput.
        prompt_targets: (sequence, first, end) of those whose prompt logprobs come with this step, in the order of
            SamplerOutput: one for each prompt token from `first` to before `end`.
        num_tokens, num_prefill: tokens that it computes, and how many of them are not decodes.
    """

    request: ExecuteModelRequest
    rows: np.ndarray
    sampled_rows: np.ndarray
    sampled: list[Sequence]
    prompt_targets: list[tuple[Sequence, int, int]]
    num_tokens: int
    num_prefill: int


@dataclass(slots=True)
class Changes:
    """What the next request carries beside the rows it computes. Pairs are (source block, destination block).

    Attributes:
        finished: rows. entered: sequences that came into rows. grown: (row, column, block) of running ones.
    """

    finished: list[int] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    entered: list[Sequence] = field(default_factory=list)
    grown: list[tuple[int, int, int]] = field(default_factory=list)

    def request(self, rows: np.ndarray, counts: np.ndarray, computed: np.ndarray, append_rows: np.ndarray,
                append_tokens: np.ndarray, **values: int) -> ExecuteModelRequest:
        """Args: rows, counts, computed: int [num_seqs]. append_rows, append_tokens: int [num_appended]."""
        new, grown = self.entered, self.grown
        return ExecuteModelRequest(
            finished_rows=_ints(self.finished), new_rows=_ints([s.row for s in new]),
            new_lens=_ints([len(s) for s in new]), new_prompt_lens=_ints([len(s.prompt_ids) for s in new]),
            new_tokens=_ints([t for s in new for t in s.token_ids]),
            new_floats=np.array([s.floats for s in new], np.float32) if new else _NO_FLOATS,
            new_ints=np.array([s.ints for s in new], np.int64) if new else _NO_INTS,
            append_rows=append_rows.astype(np.int32), append_tokens=append_tokens.astype(np.int32),
            block_rows=_ints([s.row for s in new] + [row for row, _, _ in grown]),
            block_starts=_ints([0] * len(new) + [column for _, column, _ in grown]),
            block_counts=_ints([len(s.blocks) for s in new] + [1] * len(grown)),
            new_blocks=_ints([b for s in new for b in s.blocks] + [block for _, _, block in grown]),
            rows=rows.astype(np.int32), num_scheduled=counts.astype(np.int32), num_computed=computed.astype(np.int32),
            blocks_to_copy=_pairs(self.copies), blocks_to_swap_in=_pairs(self.swap_in),
            blocks_to_swap_out=_pairs(self.swap_out), **values)


def _ints(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32) if values else _NONE


def _pairs(pairs: list[tuple[int, int]]) -> np.ndarray | None:
    return np.array(pairs, np.int32) if pairs else None
