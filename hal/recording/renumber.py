"""Renumbering of the KV blocks in recorded requests."""

from __future__ import annotations

from typing import Any

import numpy as np

from hal.contracts.request import ExecuteModelRequest

# For each column of the pairs, whether it names blocks of the device.
_MOVES = ("blocks_to_copy", (True, True)), ("blocks_to_swap_in", (False, True)), ("blocks_to_swap_out", (True, False))


def used_blocks(requests: list[ExecuteModelRequest], *, device: bool) -> np.ndarray[Any, Any]:
    """The ids of all used blocks of the device, or of the host, in ascending order."""
    found = [r.new_blocks for r in requests] if device else []
    for r in requests:
        for name, sides in _MOVES:
            found += [r[name][:, i] for i, side in enumerate(sides) if side == device and r[name] is not None]
    return np.unique(np.concatenate([np.zeros(0, np.int32), *found]))


def renumbered(requests: list[ExecuteModelRequest], blocks: np.ndarray[Any, Any], host: np.ndarray[Any, Any],
                ) -> list[ExecuteModelRequest]:
    """The same requests, with device blocks numbered from 1 and host blocks from 0. So a cache needs only as many
    blocks as are used."""
    made: list[ExecuteModelRequest] = []
    digest = requests[0].digest if requests else 0
    for r in requests:
        changed: dict[str, Any] = {"new_blocks": np.searchsorted(blocks, r.new_blocks) + 1}
        for name, sides in _MOVES:
            if r[name] is not None:
                changed[name] = np.stack([np.searchsorted(blocks, r[name][:, i]) + 1 if side else
                                          np.searchsorted(host, r[name][:, i]) for i, side in enumerate(sides)], 1)
        values = {f.name: r[f.name] for f in ExecuteModelRequest.schema.fields}
        values |= {name: array.astype(np.int32) for name, array in changed.items()}
        made.append(ExecuteModelRequest(**{**values, "digest": digest}))
        digest = made[-1].chain()
    return made
