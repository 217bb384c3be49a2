"""A vendor's package: it registers a backend of torch.distributed under a name of its own, and a Backend that names it.
Its groups are those of gloo, which every machine has. A list of the groups made shows that they were used."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hal.contracts.device import Collectives
from hal.testing.null import NullBackend

made: list[int] = []  # sizes of the groups of this process


def _make(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    made.append(size)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices, options._timeout = [gloo.create_device(hostname="127.0.0.1")], timeout
    return gloo(store, rank, size, options)


class VendorBackend(NullBackend):
    name = "vendor:backend"


if "VENDORCCL" not in dist.Backend._plugins:
    dist.Backend.register_backend("vendorccl", _make, devices=["cpu"])
VendorBackend.collectives = Collectives("vendorccl")
backend = VendorBackend()
