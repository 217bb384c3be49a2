"""Run as a script: a rank that joins, says so, and waits to be killed."""

from __future__ import annotations

import sys
import time

import torch

from hal.config import Topology
from workers.groups import join_store
from workers.links import connect  # noqa: F401  # what a worker process imports
from workers.planes import make_plane
from workers.shm_comm import ShmCommunicator

what, address = sys.argv[1], sys.argv[2]
store, topology = join_store(address, 2), Topology(tp=2, rank=1)
joined = ShmCommunicator(topology, torch.device("cpu"), store) if what == "data" else make_plane(what, topology, store)
print("joined", flush=True)
time.sleep(60)
