"""Run by torchrun: a rank fails as TEST_FAULT says, or asks for something else; each writes its error to a folder. None
fails as a process, since torchrun then ends the others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import worker_cases

from hal.errors import HalError

folder, rank, fault = Path(sys.argv[1]), os.environ["RANK"], sys.argv[2]
prompts = [[1, 2, 3], [4] * (5 if "differ" in fault and rank == "1" else 6)]
try:
    worker_cases.Driver(worker_cases.executor(device="worker_cases:faulty", tp=2, wire="none",
                                              control_plane="gloo" if "gloo" in fault else "auto"), prompts).run(6)
except HalError as error:
    (folder / rank).write_text(f"{type(error).__name__}: {error}")
