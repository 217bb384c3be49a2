"""Where the ranks that the driver started tell each other how they can be reached.

It goes through the pipes between the driver and each rank, which no other process has: nothing listens. No torch here,
since a rank takes part before it has loaded it.
"""

from __future__ import annotations

import threading
from base64 import b64decode, b64encode
from collections.abc import Callable

from hal.errors import WorkerError

CONNECT = 120.0  # seconds that another rank may come later


class Rendezvous:
    """Entries, of which every rank holds all: one that a rank sets goes to the driver, which passes it on.

    Args:
        host: the driver's address, as the ranks reach it.
        tell: sends an entry, as `arrived` takes it: to the driver, or, on the driver, to all ranks.
    """

    def __init__(self, host: str, tell: Callable[[str, str], None]) -> None:
        self.host, self._tell = host, tell
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def arrived(self, key: str, value: str) -> None:
        """Take over what another rank set; `value` in base64."""
        with self._changed:
            self._entries[key] = b64decode(value)
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        encoded = b64encode(value).decode()
        self.arrived(key, encoded)
        self._tell(key, encoded)

    def get(self, key: str, seconds: float = CONNECT) -> bytes:
        """Waits for it. Raises WorkerError: it did not come within `seconds`."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._entries, seconds):
                raise WorkerError(f"connecting with the other ranks failed: {key!r} did not come within {seconds:g} s",
                                  rank=-1, cause="timeout")
            return self._entries[key]

    def has(self, key: str) -> bool:
        return key in self._entries
