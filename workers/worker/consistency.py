"""Facts that must be the same on all ranks. A difference is named at the start; later it would be a hang or a wrong
token."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hal.config import WorkerConfig
from hal.contracts.inputs import SamplingInput, WorkerInput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.errors import StateError
from hal.features import FEATURES
from hal.schema import Declared


def facts_of(config: WorkerConfig) -> dict[str, str]:
    """The facts of a rank that knows its configuration, field by field, so that a difference has a name."""
    try:
        found = {"version": version("hal-runtime")}
    except PackageNotFoundError:  # a source tree
        found = {}
    found["HAL_STRICT"] = str(os.environ.get("HAL_STRICT") == "1")  # strict ranks exchange more messages
    found["step features"] = ", ".join(type(feature).__name__ for feature in FEATURES)
    for name in ("engine", "model"):
        found |= {f"{name}.{field}": repr(value) for field, value in dataclasses.asdict(getattr(config, name)).items()}
    return found | schemas_of(ExecuteModelRequest, SamplingRequest, WorkerInput, SamplingInput)


def schemas_of(*kinds: type[Declared]) -> dict[str, str]:
    return {f"schema {kind.__name__}": f"{kind.schema.fingerprint:016x}" for kind in kinds}


def agree(own: Mapping[str, str], reports: list[dict[str, Any]]) -> None:
    """Compare the driver's facts with those of each rank ("rank", "facts"). Raises StateError, which names rank and
    field."""
    for report in reports:
        theirs = report["facts"]
        for field in sorted(own.keys() | theirs.keys()):
            if own.get(field) != theirs.get(field):
                raise StateError(f"rank {report['rank']} differs from the driver in {field}", got=theirs.get(field),
                                 expected=own.get(field), hint="give all ranks the same library and configuration")
