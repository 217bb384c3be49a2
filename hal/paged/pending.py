"""The pending tokens on the device (see hal.features.pending)."""

from __future__ import annotations

import torch

from hal.contracts.communicator import Communicator
from hal.contracts.inputs import PagedModelInput


class PendingTokens:
    """The token that each row sampled last.

    Attributes:
        last: int32 [max_rows + 1]; the last entry takes what padding writes. Where the row sampled -1 (see
            SamplerOutput), it is 0, which the next step can look up: the host ends that sequence.
        taken: int32 [num_samples], the tokens of the decode step that was taken last for a message of several steps, -1
            included; None after any other step.
    """

    def __init__(self, max_rows: int, device: torch.device, communicator: Communicator) -> None:
        self.last = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self.taken: torch.Tensor | None = None
        self.communicator = communicator

    def input_ids(self, m: PagedModelInput) -> torch.Tensor:
        """The step's token ids, [num_tokens] int32, with the pending ones filled in."""
        rows = m.pending_rows
        return m.input_ids if rows is None else torch.where(rows < 0, m.input_ids, self.last[rows])

    def keep(self, m: PagedModelInput, token_ids: torch.Tensor | None) -> None:
        """token_ids [num_samples] int32 on the rank that samples; its tensor-parallel peers give None, and get them."""
        several = m.stop_ids is not None
        if not (several or m.sampled_rows is not None) or not m.num_samples:
            return
        if self.communicator.topology.tp > 1:
            token_ids = torch.zeros_like(m.logits_indices[:m.num_samples]) if token_ids is None else token_ids.clone()
            token_ids = self.communicator.all_reduce(token_ids)
        assert token_ids is not None
        self.taken = token_ids if several else None
        if m.sampled_rows is None:
            return
        self.last[m.sampled_rows[:m.num_samples]] = token_ids.clamp(min=0)
