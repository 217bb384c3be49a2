"""A recording that may be given to others: the tokens are others, and what they mean is gone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hal.config import BUNDLED_MODEL
from hal.contracts.executor import Executor
from hal.contracts.request import ExecuteModelRequest
from hal.features import FEATURES
from hal.recording.check import inputs_of
from hal.recording.format import RecordedStep, Recording

KEPT = ("kept: lengths, the order of steps, which tokens are equal, sampling parameters, the model's shape, versions; "
        "not kept: token ids, text, paths, error messages, outputs")


def shareable(recording: Recording) -> Recording:
    """The recording with every token id replaced by another one, by a permutation of the vocabulary that nobody keeps.
    Equal tokens stay equal, since caching and penalties depend on that; so in a long text frequent tokens can still be
    told from rare ones. Outputs belong to the old tokens and are left out: `refill` makes new ones."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(16), "little"))
    ids = rng.permutation(recording.model.vocab_size).astype(np.int32)
    requests = [_renamed(step.request, ids) for step in recording.steps]
    info = {**recording.info, "shareable": True}
    if "error" in info:
        info["error"] = str(info["error"]).partition(":")[0]
    model = recording.ignored.get("model", recording.engine.model)
    path = {} if Path(model) == BUNDLED_MODEL or model == "(bundled)" else {"model": Path(model).name}
    return with_requests(replace(recording, info=info, ignored={**recording.ignored, **path}), requests)


def _renamed(request: ExecuteModelRequest, ids: np.ndarray[Any, Any]) -> ExecuteModelRequest:
    changed: dict[str, Any] = {}
    for name in ("new_tokens", "append_tokens", "draft_tokens"):
        tokens = request[name]
        if tokens is not None:
            changed[name] = np.where(tokens < 0, tokens, ids[tokens]).astype(np.int32)
    for feature in FEATURES:
        changed |= feature.renamed(request, ids)
    return ExecuteModelRequest(**{f.name: request[f.name] for f in ExecuteModelRequest.schema.fields} | changed)


def with_requests(recording: Recording, requests: Sequence[ExecuteModelRequest]) -> Recording:
    """A recording of the same run with these requests, numbered anew, and without outputs. Raises WireError: the
    requests are not steps that an engine could run."""
    digest, made = 0, list[ExecuteModelRequest]()
    for number, request in enumerate(requests):
        values = {f.name: request[f.name] for f in ExecuteModelRequest.schema.fields}
        made.append(ExecuteModelRequest(**{**values, "step": number, "digest": digest}))
        digest = made[-1].chain()
    inputs = inputs_of(made, recording.engine, recording.model, paged=recording.paged)
    return replace(recording, steps=[RecordedStep(r, m) for r, m in zip(made, inputs, strict=True)])


def refill(recording: Recording, start: Callable[[], Executor]) -> None:
    """Run the steps on an executor, and keep its outputs. A step that fails ends the recording."""
    executor = start()
    try:
        for i, step in enumerate(recording.steps):
            try:
                step.output = executor.execute_model(step.request).result()
            except Exception as error:
                recording.info["error"] = type(error).__name__
                del recording.steps[i + 1:]
                break
    finally:
        executor.shutdown()
