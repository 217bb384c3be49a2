"""How long tests wait for what has to happen, on a busy machine too."""

from __future__ import annotations

import time
from collections.abc import Callable

# Less than a heartbeat, after which a rank counts as silent, and than the 60 s that a rank lives that is not killed.
SOON = 20.0  # seconds


def soon(condition: Callable[[], object]) -> bool:
    """Whether the condition holds now or within that time."""
    end = time.monotonic() + SOON
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())
