"""Progress on the standard error: of loading and warming up, and of a batch of requests."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any


class LoadProgress:
    """A hal.contracts.runner.Progress that shows one bar for each stage of loading and warming up."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self._what:
            self.close()
            self._bar, self._what = tqdm(desc=what, total=total, leave=False, dynamic_ncols=True), what
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class RequestProgress:
    """Requests done, and tokens/s of prefill and of decode over the last steps of each kind."""

    def __init__(self, total: int, enabled: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc="generating", total=total, disable=not enabled, dynamic_ncols=True)
        self._rates = {"prefill": 0.0, "decode": 0.0}
        self._since = time.perf_counter()

    def step(self, prefill: int, decode: int, finished: int) -> None:
        """Count a step: its computed prompt tokens, its sampled tokens, and the requests that it completed."""
        if self._bar.disable:
            return
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        # A step with both counts as prefill, because prefill takes most of its time.
        kind, tokens = ("prefill", prefill) if prefill else ("decode", decode)
        old = self._rates[kind]
        self._rates[kind] = tokens / seconds if not old else 0.9 * old + 0.1 * tokens / seconds
        self._bar.set_postfix({name: f"{rate:.0f} tok/s" for name, rate in self._rates.items()}, refresh=False)
        self._bar.update(finished)

    @property
    def enabled(self) -> bool:
        return not self._bar.disable

    def aside(self) -> AbstractContextManager[object]:
        """Context manager: a terminal shows the text that the block prints above the bar."""
        aside: AbstractContextManager[object] = self._bar.external_write_mode()
        return aside

    def close(self) -> None:
        self._bar.close()
