"""The KV cache of one rank: the number of its blocks, and moves of blocks within it, to the host and back."""

from __future__ import annotations

from typing import Any

import torch

from hal.config import WorkerConfig
from hal.contracts.block_moves import move_blocks, move_rows, on_host
from hal.contracts.device import DeviceRuntime
from hal.contracts.inputs import NULL_BLOCK, WorkerInput
from hal.contracts.runner import ModelRunnerBase
from hal.errors import CapacityError

LEAST_CONTEXT = 256  # tokens; no context is made shorter than this because memory is short
IDLE = WorkerInput()  # shared by all steps without moves, which are most; never change it


def count_blocks(config: WorkerConfig, *, free: int, reserve: int, per_block: int, host_memory: bool,
                 row_states: bool = False) -> int:
    """KV blocks of this rank, the null block included: EngineConfig.num_blocks, or as many as kv_cache_bytes or the
    memory hold. 0 where the rank keeps no blocks, and the model no states of rows.

    Args:
        free: bytes this rank may allocate, its weights already loaded. reserve: bytes of them that steps need.
        per_block: bytes of one block over this rank's layers.
        host_memory: the cache shares the host's memory with everything else, so it takes no more than max_num_seqs
            sequences of max_model_len can use.
        row_states: layers of the model keep a state per row.

    Where neither max_model_len nor num_blocks is given, the blocks may be fewer than a sequence of the model's context
    needs: the engine then shortens the context.

    Raises:
        CapacityError: one sequence of max_model_len, or of a short context, or num_blocks, does not fit.
    """
    if not per_block and not row_states:
        return 0
    engine, length = config.engine, config.max_model_len
    budget = int(free * engine.memory_fraction) - reserve
    each = -(-length // engine.block_size)
    # Blocks cost nothing on a rank that keeps none. The scheduler still counts tokens by them.
    fitting = max(budget, 0) // per_block if per_block else max(engine.num_blocks or 0, engine.max_num_seqs * each + 1)
    asked = engine.num_blocks
    if asked is None and engine.kv_cache_bytes is not None and per_block:
        asked = engine.kv_cache_bytes // per_block
    wanted = each + 1 if asked is None else asked
    if engine.max_model_len is None and engine.num_blocks is None:
        each = min(each, max(-(-LEAST_CONTEXT // engine.block_size), min(wanted, fitting) - 1))
        wanted = each + 1 if asked is None else asked
    if wanted < each + 1:
        raise CapacityError("the KV cache is too small for one sequence of max_model_len",
                            got=f"num_blocks={wanted} of {engine.block_size} tokens, one of them the null block",
                            expected=f"at least {each + 1} blocks for {min(each * engine.block_size, length)} tokens",
                            hint="raise num_blocks or kv_cache_bytes, or lower max_model_len to "
                                 f"{max(wanted - 1, 0) * engine.block_size}")
    if wanted > fitting:
        most = max(fitting - 1, 0) * engine.block_size
        raise CapacityError("memory cannot hold the KV cache",
                            got=f"{max(budget, 0):,} bytes ({free:,} free * memory_fraction {engine.memory_fraction} - "
                                f"{reserve:,} reserved for a step)",
                            expected=f"{wanted * per_block:,} bytes: {wanted} blocks of {per_block:,}",
                            hint=f"num_blocks of at most {fitting}, max_model_len of at most {most}, or a smaller "
                                 "max_num_batched_tokens, which reserves less" if most else
                                 "free memory, or ask for a smaller model, max_num_batched_tokens or max_num_seqs")
    if asked is not None:
        return asked
    return min(fitting, engine.max_num_seqs * each + 1) if host_memory else fitting


class CacheEngine:
    """Attributes:
        device: the caches of the runner, which alone knows what they are.
        num_blocks: the number of their blocks; 0 if the rank keeps none.
        host: the blocks of the host. host_rows: the runner's row_states on the host. None until `reserve_host`.
        runner: reads and writes the device's blocks.
    """

    def __init__(self, device: Any, num_blocks: int,
                 runner: ModelRunnerBase[Any] | type[ModelRunnerBase[Any]] = ModelRunnerBase) -> None:
        self.device, self.num_blocks, self.runner = device, num_blocks, runner
        self.host: list[torch.Tensor] = []
        self.host_rows: list[torch.Tensor] = []

    def reserve_host(self, num_cpu_blocks: int, runtime: DeviceRuntime | None = None) -> None:
        """Allocate memory for swapped blocks and rows. A block is read for its shapes, which may use a program that the
        runner's warm-up compiles. `runtime`: of the device; it gives the host's memory."""
        if not num_cpu_blocks:
            return
        if self.num_blocks:
            block = self.runner.read_blocks(self.device, torch.tensor([NULL_BLOCK]))
            self.host = on_host(block, num_cpu_blocks, runtime)
        states = self.runner.row_states
        self.host_rows = on_host(states, states[0].shape[1] if states else 0, runtime)

    def apply(self, step: WorkerInput) -> None:
        """See hal.contracts.block_moves. Raises InputError."""
        move_blocks(step, self.device, self.num_blocks, self.host, self.runner)
        move_rows(step, self.runner.row_states, self.host_rows)
