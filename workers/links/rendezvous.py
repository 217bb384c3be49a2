"""The rendezvous of the ranks that the driver started: they tell each other how they can be reached.

Its entries go through the pipes between the driver and each rank. No other process has these pipes, and nothing
listens. This module does not load torch, because a rank takes part before it has loaded torch.
"""

from __future__ import annotations

import threading
from base64 import b64decode, b64encode
from collections.abc import Callable

from hal.errors import WorkerError

CONNECT = 120.0  # seconds that another rank may arrive later


class Rendezvous:
    """A store of entries, all of which every rank holds. A rank sends an entry to the driver, which passes it on.

    Args:
        host: the address at which ranks reach the driver.
        tell: sends an entry in the form that `arrived` takes: to the driver or, on the driver, to all ranks.
    """

    def __init__(self, host: str, tell: Callable[[str, str], None]) -> None:
        self.host, self._tell = host, tell
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def arrived(self, key: str, value: str) -> None:
        """Store an entry that another rank has set; `value` is base64."""
        with self._changed:
            self._entries[key] = b64decode(value)
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        encoded = b64encode(value).decode()
        self.arrived(key, encoded)
        self._tell(key, encoded)

    def get(self, key: str, seconds: float = CONNECT) -> bytes:
        """Wait for an entry. Raises WorkerError: it did not arrive within `seconds`."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._entries, seconds):
                raise WorkerError(f"connecting with the other ranks failed: {key!r} did not come within {seconds:g} s",
                                  rank=-1, cause="timeout")
            return self._entries[key]

    def has(self, key: str) -> bool:
        return key in self._entries
