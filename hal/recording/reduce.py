"""The smallest recording found that still shows a fault: fewer steps, fewer sequences and, with random weights, fewer
layers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hal.config import Topology, WorkerConfig
from hal.contracts import backend as backends
from hal.contracts.executor import make_executor
from hal.contracts.request import ExecuteModelRequest
from hal.errors import HalError, InputError, WireError
from hal.recording.bisect import Bisection, bisect_recording
from hal.recording.format import Recording
from hal.recording.record import FlightRecorder, rebuild
from hal.recording.share import with_requests

# Of a dimension of a request's arrays: the array that says to which row each entry belongs.
_ROWS = {"num_finished": "finished_rows", "num_new": "new_rows", "num_appended": "append_rows",
         "num_block_rows": "block_rows", "num_seqs": "rows", "num_biased": "bias_rows", "num_masked": "mask_rows",
         "num_adapted": "adapted_rows"}
# Of a dimension whose entries are ragged: how many of them each entry of another dimension has.
_RAGGED = {"num_new_tokens": "new_lens", "num_appended_tokens": "append_counts", "num_new_blocks": "block_counts",
           "num_drafts": "draft_counts", "num_bias": "bias_counts"}
_MOVES = ("blocks_to_copy", "blocks_to_swap_in", "blocks_to_swap_out", "rows_to_swap_in", "rows_to_swap_out",
          "adapters_to_load")
# Arrays of a feature that a request has together, or none of them.
_TOGETHER = (("bias_rows", "bias_counts", "bias_ids", "bias_values"), ("mask_rows", "token_masks"),
             ("adapted_rows", "adapted_slots"))
_SHORT = 64  # tokens that one of the requests computes which rebuild a cache, at least


@dataclass(slots=True)
class Reduction:
    """Attributes: tries: how many recordings were run. found: what the smallest one shows."""

    recording: Recording
    tries: int
    found: Bisection | None

    def __str__(self) -> str:
        rows = {row for step in self.recording.steps for row in step.request.rows.tolist()}
        text = (f"{len(self.recording.steps)} steps, {len(rows)} sequences, {self.recording.model.num_layers} layers, "
                f"after {self.tries} tries")
        return text if self.found is None else f"{text}\n{self.found}"


def reduce(recording: Recording, device: str, against: str, *, model: str | None = None,
           progress: Callable[[str], None] = lambda text: None, **options: Any) -> Reduction:
    """Find a smaller recording in which `device` still parts from `against` or, if the recording ends in an error, in
    which its last step still fails on `device`.

    Args:
        options: engine options of both devices; model: see Recording.config.

    Raises:
        WireError: the recording shows no fault, or the runner's inputs are not paged ones. As `bisect`.
    """
    if not recording.paged:
        raise WireError("only a recording of a runner with paged inputs can be reduced")
    tries = 0

    def shows(candidate: Recording) -> Bisection | bool | None:
        nonlocal tries
        tries += 1
        progress(f"try {tries}: {len(candidate.steps)} steps")
        if recording.info.get("error"):
            return _fails(candidate, device, model, options) or None
        found = bisect_recording(candidate, device, against, model=model, until_divergence=True, **options)
        return found if found.divergence is not None else None

    best = recording
    found = shows(best)
    if found is None:
        raise WireError("the recording shows no fault here", got=f"{device} against {against}: nothing differs",
                        hint="name the device in doubt with --device")
    at = found.divergence.step if isinstance(found, Bisection) and found.divergence else len(best.steps) - 1
    best = with_requests(best, [step.request for step in best.steps[:at + 1]])
    rebuilt = _rebuilt(best)  # the step alone, on a cache that is rebuilt; if that hides the fault, all steps up to it
    again = None if rebuilt is None else shows(rebuilt)
    if rebuilt is not None and again is not None:
        best, found = rebuilt, again
    best, found = _fewer_rows(best, found, shows)
    if best.engine.random_weights or best.ignored.get("random_weights"):
        best, found = _fewer_layers(best, found, shows)
    return Reduction(best, tries, found if isinstance(found, Bisection) else None)


def _fails(candidate: Recording, device: str, model: str | None, options: dict[str, Any]) -> bool:
    backend = backends.select(device)
    config = candidate.config(backend, device=device, model=model, **options)
    executor = make_executor(config.engine, config.model, backend)
    try:
        for i, step in enumerate(candidate.steps):
            try:
                executor.execute_model(step.request).result()
            except Exception:
                return i + 1 == len(candidate.steps)
        return False
    finally:
        executor.shutdown()


def _rebuilt(recording: Recording) -> Recording | None:
    """The last step, after steps that prefill what its sequences had in the cache."""
    engine = replace(recording.engine, max_num_batched_tokens=max(recording.engine.max_num_batched_tokens, _SHORT))
    config = WorkerConfig(recording.engine, recording.model, Topology())
    tokens = FlightRecorder("", config, backends.load("null"))
    for step in recording.steps:
        assert step.input is not None
        tokens.moved(step.request, engine.num_blocks or 1)  # type: ignore[arg-type]  # it has the same block moves
        tokens.began(step.input, None)
    last = recording.steps[-1].input
    assert last is not None
    try:
        return with_requests(replace(recording, engine=engine), rebuild(
            last, tokens.slots, engine.max_num_batched_tokens, tokens.adapters))
    except HalError:
        return None


def _fewer_rows(best: Recording, found: Any, shows: Callable[[Recording], Any]) -> tuple[Recording, Any]:
    """Parts of the sequences, or all without a part: halves first, at last one sequence after another."""
    rows = sorted({row for step in best.steps for row in step.request.rows.tolist()})
    size = len(rows) // 2
    while size:
        parts = [rows[first:first + size] for first in range(0, len(rows), size)]
        for kept in [*parts, *([row for row in rows if row not in part] for part in parts)]:
            smaller = only(best, kept) if 0 < len(kept) < len(rows) else None
            again = None if smaller is None else shows(smaller)
            if smaller is not None and again is not None:
                best, found, rows = smaller, again, kept
                size = min(size, len(rows) // 2)
                break
        else:
            size //= 2
    return best, found


def _fewer_layers(best: Recording, found: Any, shows: Callable[[Recording], Any]) -> tuple[Recording, Any]:
    for layers in (1, 2, best.model.num_layers // 2):
        if not 0 < layers < best.model.num_layers:
            continue
        try:
            smaller = replace(best, model=replace(best.model, num_layers=layers))
            again = shows(smaller)
        except HalError:  # this model says something of each layer
            continue
        if again is not None:
            return smaller, again
    return best, found


def only(recording: Recording, rows: Collection[int]) -> Recording | None:
    """The recording with the sequences of some rows alone; None where that cannot be done."""
    requests, finished = list[ExecuteModelRequest](), list[int]()
    for step in recording.steps:
        request = _only(step.request, {*rows})
        if not len(request.rows):
            if len(request.new_rows) or len(request.append_rows) or any(request[name] is not None for name in _MOVES):
                return None
            finished += request.finished_rows.tolist()
            continue
        if finished:
            request.finished_rows = np.array([*finished, *request.finished_rows.tolist()], np.int32)
            finished = []
        requests.append(request)
    try:
        return with_requests(recording, requests) if requests else None
    except (WireError, InputError):
        return None


def _only(request: ExecuteModelRequest, rows: set[int]) -> ExecuteModelRequest:
    changed: dict[str, Any] = {}
    for f in ExecuteModelRequest.schema.fields:
        value, dim = request[f.name], str(f.array.dims[0]) if f.array is not None and f.array.dims else ""
        if value is None or f.array is None:
            continue
        owner = _ROWS.get(dim)
        if owner is not None:
            changed[f.name] = value[np.isin(request[owner], [*rows])]
        elif dim in _RAGGED:
            counts = request[_RAGGED[dim]]
            counts = np.ones(len(value), np.int64) if counts is None else counts
            belongs = next(str(g.array.dims[0]) for g in ExecuteModelRequest.schema.fields
                           if g.name == _RAGGED[dim] and g.array is not None)
            changed[f.name] = value[np.repeat(np.isin(request[_ROWS[belongs]], [*rows]), counts)]
    for group in _TOGETHER:
        if group[0] in changed and not len(changed[group[0]]):
            changed |= dict.fromkeys(group)
    return ExecuteModelRequest(**{f.name: request[f.name] for f in ExecuteModelRequest.schema.fields} | changed)
