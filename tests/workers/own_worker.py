"""A worker that is not the generic one, but stands on it in part."""

from __future__ import annotations

import pickle
from typing import Any

from workers.worker.generic import Worker


class OwnWorker(Worker):
    def determine_num_blocks(self) -> int:
        return 40 + 2 * self.topology.rank  # the smallest counts


class NoPickleWorker(Worker):
    """Its rank ends at anything pickled from here on."""

    def connect(self, *args: Any) -> None:
        for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
            setattr(pickle, name, refuse)
        super().connect(*args)


def refuse(*args: Any, **options: Any) -> None:
    raise AssertionError("something is pickled")
