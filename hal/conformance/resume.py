"""A verdict from several runs: the results of an earlier report are kept, if its run was the same in all else."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from hal.conformance.case import Case
from hal.conformance.run import Kit, Report, Result
from hal.contracts.backend import Backend
from hal.errors import ConfigError

# This case looks at what all cases before it have noted, so it runs again in each run.
OVER_ALL = "L4/warm-up/no_case_has_compiled"
SHAPES = "L4/shapes/those_of_a_recording"  # what it shows depends on the recording of --shapes
_FREE = ("level",)  # facts of a run that may differ, since they do not change the result of a case


def code(backend: Backend) -> str:
    """The first 16 digits of the SHA-256 of the Python files of the backend's package, so that an edit is noticed."""
    name = type(backend).__module__
    top = sys.modules.get(name.partition(".")[0])
    folders = list(getattr(top, "__path__", ()))
    file = getattr(sys.modules.get(name), "__file__", None)
    paths = sorted(Path(folders[0]).rglob("*.py")) if folders else [Path(file)] if file else []
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def differing(header: dict[str, str], other: dict[str, str]) -> list[str]:
    """The facts of two runs that keep their results from being one verdict."""
    return sorted(name for name in header.keys() | other.keys() if name not in _FREE
                  and header.get(name) != other.get(name))


def resume(kit: Kit, report: Report, data: dict[str, Any]) -> dict[tuple[str, str], Result]:
    """Take over an earlier report, as hal.conformance.report.read gives it.

    Returns:
        its results by case and dtype.

    Raises:
        ConfigError: it is of another run.
    """
    apart = differing(report.header, data["header"])
    if tuple(data["dtypes"]) != report.dtypes or data["capabilities"] != report.capabilities or apart:
        told = [f"{name}: {data['header'].get(name)} then, {report.header.get(name)} now" for name in apart]
        raise ConfigError("--resume names the report of another run", got="; ".join(told) or "other dtypes or "
                          "capabilities", expected="the same kit, backend, versions, dtypes, seed and examples",
                          hint="run without --resume")
    report.runs = [*(data.get("runs") or [data["header"]]), report.header]
    report.earlier_errors = data["errors"]
    kit.late.update(data.get("late", {}))
    known: dict[tuple[str, str], Case] = {(case.name, dtype): case for case, dtype in kit.work(("*",))}
    return {key: Result(known[key], key[1], r["status"], r["text"], float(r["seconds"]), r["command"], r["link"])
            for r in data["results"] if (key := (r["case"], r["dtype"])) in known}


def settled(kit: Kit, found: dict[tuple[str, str], Result], case: Case, dtype: str) -> bool:
    """Whether an earlier run has passed a case, so that it need not run again."""
    before = found.get((case.name, dtype))
    expected = any(e.covers(case.name, dtype) for e in kit.expected)
    again = case.name == OVER_ALL or (case.name == SHAPES and kit.options.shapes is not None)
    return before is not None and before.status == "pass" and not again and not expected


