"""How a paged input becomes that of the next decode step. Each function is the rule of one field (`Array.advance`): it
takes the field's value, this step's input `m`, and `taken`, and gives the value of the next step. All rules read this
step's input. A step in which every sequence decodes keeps all shapes, so a runner may copy the new values into tensors
that a graph reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hal.errors import StateError

_NULL_SLOT = 0


class Taken(NamedTuple):
    """What a step gave, on its device.

    Attributes:
        token_ids: int32 [num_seqs], the token that each sequence sampled; padding and rows that stop may hold anything.
        going: bool [num_seqs]: the sequence takes the next decode step. If False, it stays where it is, and what it
            computes from now on is written to the null block. Padding never goes on.
    """

    token_ids: torch.Tensor
    going: torch.Tensor


def input_ids(value: torch.Tensor, m: Any, taken: Taken) -> torch.Tensor:
    return torch.where(taken.going, taken.token_ids, 0)


def seq_lens(value: torch.Tensor, m: Any, taken: Taken) -> torch.Tensor:
    lens: torch.Tensor = value + taken.going
    return lens


def positions(value: torch.Tensor, m: Any, taken: Taken) -> torch.Tensor:
    last: torch.Tensor = m.seq_lens + taken.going - 1
    return last.clamp(min=0)


def slot_mapping(value: torch.Tensor, m: Any, taken: Taken) -> torch.Tensor:
    # The next token has the position seq_lens. That of a row which stops may lie behind its table.
    at = torch.where(taken.going, m.seq_lens, 0)
    columns = torch.div(at, m.block_size, rounding_mode="floor")
    blocks = m.block_tables.gather(1, columns[:, None].long())[:, 0]
    return torch.where(taken.going, (blocks - columns) * m.block_size + at, _NULL_SLOT).to(value.dtype)


def state_rows(value: torch.Tensor, m: Any, taken: Taken) -> torch.Tensor:
    return torch.where(taken.going, value, -1)


def query_start_loc(value: torch.Tensor, m: Any, taken: Taken) -> torch.Tensor:
    if m.max_query_len == 1:
        return value
    return torch.nn.functional.pad(value.diff().clamp(max=1).cumsum(0, dtype=value.dtype), (1, 0))


def logits_indices(value: torch.Tensor, m: Any, taken: Taken) -> torch.Tensor:
    if m.max_query_len == 1:
        return value
    places = torch.arange(len(m.seq_lens), dtype=value.dtype, device=value.device)
    return torch.where(m.query_start_loc.diff() > 0, places, 0)


def sample_counts(value: torch.Tensor, m: Any, taken: Taken) -> torch.Tensor:
    raise StateError("a step that verifies drafts is not advanced", got=f"drafts in a step of {len(value)} sequences",
                     expected="a step without drafts", hint="the next step's drafts come from the driver")
