"""Run as a script: a rank that joins, says so, and waits to be killed."""

from __future__ import annotations

import sys
import time

import torch

from hal.config import Topology
from hal.testing.null import backend as null
from workers.control.planes import make_plane
from workers.data.shared_memory import ShmCommunicator
from workers.executors.connections import connect  # noqa: F401  # what a worker process imports
from workers.links.groups import dist
from workers.links.liveness import PeerWatch

what, path = sys.argv[1], sys.argv[2]
store, cpu = dist.FileStore(path, 2), torch.device("cpu")
joined: object
if what == "data":
    joined = ShmCommunicator(Topology(tp=2, rank=1), cpu, store)
elif what.startswith("peers of "):
    joined = PeerWatch(Topology(tp=2, rank=1), store, what.removeprefix("peers of "))
else:
    joined = make_plane(what, Topology(pp=2, rank=1), store, null, cpu)
print("joined", flush=True)
time.sleep(60)
