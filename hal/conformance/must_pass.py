"""The must-pass list: which cases a version of the kit has, so that a report with fewer is noticed, and which cases
are not written yet, so that nobody takes a gap for a pass. `python -m hal.conformance.must_pass` writes the list anew
when cases have changed; then the kit's version changes too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hal.conformance import KIT_VERSION
from hal.conformance.case import all_cases
from hal.contracts import VERSION
from hal.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "assets" / "must_pass"
UNWRITTEN = (
    "L3/model/experts: a mixture of experts, with experts on several ranks",
    "L3/model/row_states: layers with a state per row",
    "L5/layout/ep2: experts over two ranks",
)


def current() -> dict[str, Any]:
    """The list of the cases that are registered now."""
    cases = {case.name: {"level": case.level, "area": case.area, "needs": list(case.needs), "once": case.once}
             for case in all_cases()}
    return {"kit": KIT_VERSION, "contracts": VERSION, "cases": cases, "unwritten": list(UNWRITTEN)}


def read(version: str) -> dict[str, Any]:
    """The list of a version of the kit. Raises ConfigError: this library has no such list."""
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    if version not in known:
        raise ConfigError("there is no must-pass list of this version of the kit", got=version,
                          expected=" or ".join(known), hint="install the hal-runtime that made the report")
    found: dict[str, Any] = json.loads((FOLDER / f"{version}.json").read_text(encoding="utf-8"))
    return found


def digest(listed: dict[str, Any]) -> str:
    """The first 16 digits of the SHA-256 of a list."""
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    (FOLDER / f"{KIT_VERSION}.json").write_text(json.dumps(current(), indent=1) + "\n", encoding="utf-8")
