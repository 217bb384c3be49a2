"""The steps that a runner computes without a graph."""

from __future__ import annotations

from typing import Any

import pytest

from hal.contracts.inputs import PagedModelInput
from hal.paged.runner import PagedModelRunner


def eager_steps(monkeypatch: pytest.MonkeyPatch) -> list[PagedModelInput]:
    """The inputs of such steps of this process from now on, whose forward pass is the default runner's."""
    found: list[PagedModelInput] = []
    forward = PagedModelRunner.forward

    def noted(self: PagedModelRunner, m: PagedModelInput, *more: Any) -> Any:
        found.append(m)
        return forward(self, m, *more)

    monkeypatch.setattr(PagedModelRunner, "forward", noted)
    return found
