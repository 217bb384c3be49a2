"""NCCL's process groups, and sums over peer memory, which the backend supplies to workers/. Runners do not use this
module. Importing it loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hal.contracts.device import Collectives, PeerSums
from hal.errors import BackendError

if TYPE_CHECKING:
    import torch

# Groups read these variables when they are made. By default PyTorch's threads end the process, which may be the user's,
# if an operation fails or takes long, or if the device fails or is slow to answer. hal watches the ranks by itself.
SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
            "TORCH_NCCL_BLOCKING_WAIT": "0", "TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
            "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0"}  # one stream issues all of a group's anyway


class NcclCollectives(Collectives):
    """NCCL's groups. A kernel of NCCL waits for a rank that is gone until the group is aborted."""

    def __init__(self) -> None:
        super().__init__("nccl", on_device=True)

    def process_group(self, store: Any, rank: int, size: int, timeout: timedelta, control: bool = False) -> Any:
        """A group of the control plane has one thread block a kernel, on a stream of high priority."""
        import torch.distributed

        dist: Any = torch.distributed  # its stubs leave out what its documentation has
        if not dist.is_nccl_available():
            raise BackendError("this PyTorch has no such collectives", got=self.kind, expected="a CUDA build of torch",
                               hint="install a CUDA build of torch, or use --device runners.cuda:shared_gpu")
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=control)
        options._timeout = timeout
        if control:
            options.config.max_ctas = 1
        with _environment(SETTINGS):
            group = dist.ProcessGroupNCCL(store, rank, size, options)
            # Connected now, stages send over the same communicator as all else. Later each pair would make its own.
            group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
            return group

    def sums(self, store: Any, rank: int, size: int, device: torch.device) -> PeerSums | None:
        from runners.cuda.peer_memory import nvlink_sums

        return nvlink_sums(store, rank, size, device)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
