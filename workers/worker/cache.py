"""The KV cache of one rank: how many blocks it may have, and moving blocks within it and to the host and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hal.config import WorkerConfig
from hal.contracts.inputs import NULL_BLOCK, WorkerInput
from hal.contracts.runner import ModelRunnerBase
from hal.errors import CapacityError, InputError

MOVES = ("blocks_to_swap_out", "blocks_to_swap_in", "blocks_to_copy")
IDLE = WorkerInput()  # of every step that asks for nothing: most. Never to be changed


def count_blocks(config: WorkerConfig, *, free: int, reserve: int, per_block: int, host_memory: bool) -> int:
    """KV blocks of this rank, the null block included: EngineConfig.num_blocks, or what the memory holds.

    Args:
        free: bytes this rank may allocate, its weights already loaded. reserve: bytes of them that steps need.
        per_block: bytes of one block over this rank's layers.
        host_memory: the cache shares the host's memory with everything else, so it takes no more than max_num_seqs
            sequences of max_model_len can use.

    Raises:
        CapacityError: one sequence of max_model_len, or num_blocks, does not fit.
    """
    engine, length = config.engine, config.max_model_len
    budget = int(free * engine.memory_fraction) - reserve
    each = -(-length // engine.block_size)
    fitting = max(budget, 0) // max(per_block, 1)
    wanted = engine.num_blocks or each + 1
    if wanted < each + 1:
        raise CapacityError("the KV cache is too small for one sequence of max_model_len",
                            got=f"num_blocks={wanted} of {engine.block_size} tokens, one of them the null block",
                            expected=f"at least {each + 1} blocks for {length} tokens",
                            hint=f"raise num_blocks, or lower max_model_len to {(wanted - 1) * engine.block_size}")
    if wanted > fitting:
        most = max(fitting - 1, 0) * engine.block_size
        raise CapacityError("memory cannot hold the KV cache",
                            got=f"{max(budget, 0):,} bytes ({free:,} free * memory_fraction {engine.memory_fraction} - "
                                f"{reserve:,} reserved for a step)",
                            expected=f"{wanted * per_block:,} bytes: {wanted} blocks of {per_block:,}",
                            hint=f"num_blocks of at most {fitting}, max_model_len of at most {most}, or a smaller "
                                 "max_num_batched_tokens, which reserves less" if most else
                                 "free memory, or ask for a smaller model, max_num_batched_tokens or max_num_seqs")
    if engine.num_blocks:
        return engine.num_blocks
    return min(fitting, engine.max_num_seqs * each + 1) if host_memory else fitting


class CacheEngine:
    """Attributes:
        device: one tensor a layer; dimension 1 counts blocks. host: the same with num_cpu_blocks, on the host.
        runner: reads and writes the device's blocks.
    """

    def __init__(self, device: Sequence[torch.Tensor], num_cpu_blocks: int,
                 runner: ModelRunnerBase[Any] | type[ModelRunnerBase[Any]] = ModelRunnerBase) -> None:
        self.device, self.runner = device, runner
        pin = num_cpu_blocks > 0 and device[0].is_cuda
        self.host = [torch.zeros((c.shape[0], num_cpu_blocks, *c.shape[2:]), dtype=c.dtype, pin_memory=pin)
                     for c in device]

    def apply(self, step: WorkerInput) -> None:
        """Move blocks before a step: swaps first, then copies.

        All blocks that leave by a swap are read before any block is written, so that a block, of the device or of the
        host, that one swap frees may be filled by another in the same step. Copies come after: a copy may start from
        a block that was swapped in, and may fill one that was swapped out. All of its sources are read before any
        destination is written.

        Raises:
            InputError: a pair names a block that does not exist, or two pairs write the same one.
        """
        pairs = [step.__dict__[name] for name in MOVES]
        if all(p is None or not len(p) for p in pairs):
            return
        blocks = self.device[0].shape[1] if self.device else 0
        host_blocks = self.host[0].shape[1] if self.host else 0
        limits = ((blocks, host_blocks), (host_blocks, blocks), (blocks, blocks))
        (out_from, out_to), (in_from, in_to), (copy_from, copy_to) = (
            _indices(name, p, *limit) for name, p, limit in zip(MOVES, pairs, limits, strict=True))
        leaving = [x.cpu() for x in self.runner.read_blocks(self.device, out_from)] if len(out_from) else []
        if len(in_from):
            self.runner.write_blocks(self.device, in_to, [host[:, in_from] for host in self.host])
        for host, blocks_out in zip(self.host, leaving, strict=False):
            host[:, out_to] = blocks_out
        if len(copy_from):
            self.runner.write_blocks(self.device, copy_to, self.runner.read_blocks(self.device, copy_from))


def _indices(name: str, pairs: np.ndarray | None, sources: int, targets: int) -> torch.Tensor:
    """[2, n] int64: source blocks and destination blocks."""
    if pairs is None or not len(pairs):
        return torch.empty(2, 0, dtype=torch.int64)
    if int(pairs[:, 0].max()) >= sources or int(pairs[:, 1].max()) >= targets or int(pairs.min()) < 0:
        raise InputError(f"WorkerInput.{name} names a block that does not exist", got=pairs.tolist(), fields=(name,),
                         expected=f"sources below {sources}, destinations below {targets}")
    if len(np.unique(pairs[:, 1])) != len(pairs):
        raise InputError(f"WorkerInput.{name} writes a block twice", got=pairs.tolist(), fields=(name,))
    if name != "blocks_to_swap_out" and (pairs[:, 1] == NULL_BLOCK).any():
        raise InputError(f"WorkerInput.{name} writes the null block", got=pairs.tolist(), fields=(name,))
    return torch.from_numpy(pairs.T.astype(np.int64))
