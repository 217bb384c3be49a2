"""The order in which one step copies and swaps KV blocks: said once, for every cache that follows a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hal.contracts.inputs import NULL_BLOCK, WorkerInput
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import ModelRunnerBase
from hal.errors import InputError

MOVES = ("blocks_to_swap_out", "blocks_to_swap_in", "blocks_to_copy")


def moves_blocks(step: WorkerInput | ExecuteModelRequest) -> bool:
    """Whether the step copies or swaps any block; most steps do not."""
    fields = step.__dict__
    return any(fields[name] is not None for name in MOVES)


def move_blocks(step: WorkerInput | ExecuteModelRequest, device: Sequence[torch.Tensor], host: Sequence[torch.Tensor],
                runner: ModelRunnerBase[Any] | type[ModelRunnerBase[Any]] = ModelRunnerBase) -> None:
    """Move blocks before a step: swaps first, then copies.

    All blocks that leave by a swap are read before any block is written, so that a block, of the device or of the
    host, that one swap frees may be filled by another in the same step. Copies come after: a copy may start from
    a block that was swapped in, and may fill one that was swapped out. All of its sources are read before any
    destination is written.

    Args:
        device, host: tensors in the same order; dimension 1 counts blocks.
        runner: its read_blocks and write_blocks reach the device's blocks.

    Raises:
        InputError: a pair names a block that does not exist, or two pairs write the same one.
    """
    if not moves_blocks(step):
        return
    blocks, host_blocks = (tensors[0].shape[1] if tensors else 0 for tensors in (device, host))
    out_from, out_to = _indices(step, "blocks_to_swap_out", blocks, host_blocks)
    in_from, in_to = _indices(step, "blocks_to_swap_in", host_blocks, blocks)
    copy_from, copy_to = _indices(step, "blocks_to_copy", blocks, blocks)
    leaving = [x.cpu() for x in runner.read_blocks(device, out_from)] if len(out_from) else []
    if len(in_from):
        runner.write_blocks(device, in_to, [tensor[:, in_from] for tensor in host])
    for tensor, values in zip(host, leaving, strict=False):
        tensor[:, out_to] = values
    if len(copy_from):
        runner.write_blocks(device, copy_to, runner.read_blocks(device, copy_from))


def _indices(step: WorkerInput | ExecuteModelRequest, name: str, sources: int, targets: int) -> torch.Tensor:
    """[2, n] int64: source blocks and destination blocks."""
    pairs: np.ndarray[Any, Any] | None = step[name]
    if pairs is None or not len(pairs):
        return torch.empty(2, 0, dtype=torch.int64)
    field = f"{type(step).__name__}.{name}"
    if int(pairs[:, 0].max()) >= sources or int(pairs[:, 1].max()) >= targets or int(pairs.min()) < 0:
        raise InputError(f"{field} names a block that does not exist", got=pairs.tolist(), fields=(name,),
                         expected=f"sources below {sources}, destinations below {targets}")
    if len(np.unique(pairs[:, 1])) != len(pairs):
        raise InputError(f"{field} writes a block twice", got=pairs.tolist(), fields=(name,))
    if name != "blocks_to_swap_out" and (pairs[:, 1] == NULL_BLOCK).any():
        raise InputError(f"{field} writes the null block", got=pairs.tolist(), fields=(name,))
    return torch.from_numpy(pairs.T.astype(np.int64))
