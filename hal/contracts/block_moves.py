"""The order in which a step copies and swaps KV blocks, and swaps the states of rows. Every cache that follows a step
uses these functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hal.contracts.device import DeviceRuntime
from hal.contracts.inputs import NULL_BLOCK, WorkerInput
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import ModelRunnerBase
from hal.errors import InputError

MOVES = ("blocks_to_swap_out", "blocks_to_swap_in", "blocks_to_copy", "rows_to_swap_out", "rows_to_swap_in")
Runner = ModelRunnerBase[Any] | type[ModelRunnerBase[Any]]


def on_host(values: Sequence[torch.Tensor], count: int, runtime: DeviceRuntime | None = None) -> list[torch.Tensor]:
    """Zeroed memory on the host for `count` blocks, or rows, of each of these tensors, whose dimension 1 counts them.
    They belong to the device that has `runtime`."""
    # Page-locked memory needs a driver, which Triton's interpreter lacks: it is asked for only where something swaps.
    make = (runtime if runtime is not None and count else DeviceRuntime()).host_memory
    return [make(x.device, (x.shape[0], count, *x.shape[2:]), x.dtype) for x in values]


def moves_blocks(step: WorkerInput | ExecuteModelRequest) -> bool:
    """Whether the step copies or swaps any block, or swaps a row's state; most steps do not."""
    fields = step.__dict__
    return any(fields[name] is not None for name in MOVES)


def load_adapters(step: Any, runner: ModelRunnerBase[Any]) -> None:
    """Fill the slots that a WorkerInput or an ExecuteModelRequest names, before the step."""
    if step.adapters_to_load is not None:
        for slot, path in zip(step.adapters_to_load.tolist(), step.adapter_paths, strict=True):
            runner.load_adapter(slot, path)


def move_blocks(step: WorkerInput | ExecuteModelRequest, caches: Any, num_blocks: int, host: Sequence[torch.Tensor],
                runner: Runner = ModelRunnerBase) -> None:
    """Move blocks before a step: swaps first, then copies.

    All blocks that leave by a swap are read before any block is written, so that a block, of the device or of the
    host, that one swap frees may be filled by another in the same step. Copies come after: a copy may start from
    a block that was swapped in, and may fill one that was swapped out. All of its sources are read before any
    destination is written.

    Args:
        caches: of the runner, whose read_blocks and write_blocks alone reach their blocks.
        num_blocks: the number of these; 0 in a pipeline stage whose layers have no paged cache.
        host: memory of the host's blocks, as read_blocks gives them.

    Raises:
        InputError: a pair names a block that does not exist, or two pairs write the same one.
    """
    if not num_blocks or not moves_blocks(step):
        return
    _swap(step, "blocks", caches, num_blocks, host, runner)
    copy_from, copy_to = _indices(step, "blocks_to_copy", num_blocks, num_blocks)
    if len(copy_from):
        runner.write_blocks(caches, copy_to, runner.read_blocks(caches, copy_from))


def move_rows(step: WorkerInput | ExecuteModelRequest, states: Sequence[torch.Tensor], host: Sequence[torch.Tensor],
              ) -> None:
    """Swap the states of rows before a step, as `move_blocks` swaps blocks. Dimension 1 counts rows."""
    if states and moves_blocks(step):
        _swap(step, "rows", states, states[0].shape[1], host, ModelRunnerBase)


def _swap(step: WorkerInput | ExecuteModelRequest, what: str, device: Any, here: int, host: Sequence[torch.Tensor],
          runner: Runner) -> None:
    there = host[0].shape[1] if host else 0
    out_from, out_to = _indices(step, f"{what}_to_swap_out", here, there)
    in_from, in_to = _indices(step, f"{what}_to_swap_in", there, here)
    leaving = [x.cpu() for x in runner.read_blocks(device, out_from)] if len(out_from) else []
    if len(in_from):
        runner.write_blocks(device, in_to, [tensor[:, in_from] for tensor in host])
    for tensor, values in zip(host, leaving, strict=False):
        tensor[:, out_to] = values


def _indices(step: WorkerInput | ExecuteModelRequest, name: str, sources: int, targets: int) -> torch.Tensor:
    """[2, n] int64: sources and destinations."""
    pairs: np.ndarray[Any, Any] | None = step[name]
    if pairs is None or not len(pairs):
        return torch.empty(2, 0, dtype=torch.int64)
    field, what = f"{type(step).__name__}.{name}", name.partition("s_to_")[0]
    if int(pairs[:, 0].max()) >= sources or int(pairs[:, 1].max()) >= targets or int(pairs.min()) < 0:
        raise InputError(f"{field} names a {what} that does not exist", got=pairs.tolist(), fields=(name,),
                         expected=f"sources below {sources}, destinations below {targets}")
    if len(np.unique(pairs[:, 1])) != len(pairs):
        raise InputError(f"{field} writes a {what} twice", got=pairs.tolist(), fields=(name,))
    if name in ("blocks_to_swap_in", "blocks_to_copy") and (pairs[:, 1] == NULL_BLOCK).any():
        raise InputError(f"{field} writes the null block", got=pairs.tolist(), fields=(name,))
    return torch.from_numpy(pairs.T.astype(np.int64))
