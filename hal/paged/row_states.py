"""The states of rows in the default runner (see hal.contracts.cache.RowState)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

from hal.contracts.cache import RowState
from hal.contracts.inputs import PagedModelInput


class RowStates:
    """Attributes:
        layers: of each layer that keeps a state its tensors by name, [1, max_rows + 1, *shape]. Dimension 1 counts
            rows, as that of a paged cache counts blocks; padding writes the last row.
    """

    def __init__(self, specs: Sequence[RowState], max_rows: int, device: torch.device) -> None:
        self.layers = [{name: torch.zeros(1, max_rows + 1, *(dim.offset for dim in array.dims),
                                          dtype=getattr(torch, array.dtype), device=device)
                        for name, array in spec.tensors.items()} for spec in specs]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self.layers for tensor in layer.values()]

    def over(self, tensors: Sequence[torch.Tensor]) -> RowStates:
        """The same layers over other tensors, in the order of `tensors`."""
        made, given = copy(self), iter(tensors)
        made.layers = [{name: next(given) for name in layer} for layer in self.layers]
        return made

    def begin(self, m: PagedModelInput) -> PagedStepStates:
        return PagedStepStates(self, m)


class PagedStepStates:
    """A hal.contracts.attention.StepStates. Nothing here waits for the device."""

    def __init__(self, states: RowStates, m: PagedModelInput) -> None:
        assert m.state_rows is not None
        self.layers, self.rows = states.layers, m.state_rows.long()  # padding: -1, the last row
        self.begins = m.seq_lens == m.query_start_loc.diff()

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        found = {name: tensor[0][self.rows] for name, tensor in self.layers[layer].items()}
        # The row may hold another sequence's state, or NaN.
        return {name: x.masked_fill_(self.begins.view(-1, *[1] * (x.ndim - 1)), 0) for name, x in found.items()}

    def write(self, layer: int, **values: torch.Tensor) -> None:
        for name, tensor in self.layers[layer].items():
            tensor[0][self.rows] = values[name].to(tensor.dtype)
