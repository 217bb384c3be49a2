"""Whether a submitted report is complete and consistent. What a report says of a device is as true as its sender; what
is found here is a report that leaves something out, or that was changed after the run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hal.conformance import must_pass, report
from hal.conformance.case import LEVELS
from hal.conformance.resume import differing
from hal.conformance.run import ONCE
from hal.errors import ConfigError
from hal.testing.tolerance import TOLERANCES, Tolerances

_HEADER = ("backend", "kit", "seed", "level", "examples", "device", "python", "machine", "hal-runtime", "torch",
           "numpy")
_STATUSES = ("pass", "fail", "xfail", "n/a", "error")
_UNDECLARED = "the backend does not declare: "
# Every reason for which the kit itself says that a case is not applicable.
_REASONS = tuple(map(re.compile, (
    r"\w+ is not a PagedModelInput", r"no recordings come with this library", r"\w+ does not verify drafts",
    r"\w+ takes weights of these schemes alone: .+", r"the backend declares tp up to \d+ and pp up to \d+",
    r"one process drives the devices of all ranks: nothing crosses a control plane", r".*control_plane.*",
    r"ranks have no processes of their own, or this system does not list them", r"no case ran before this one",
    r"the runner captures no graphs that could be left out", r"the runner compiles and captures nothing",
    r"\w+ computes a step in one part \(two_phase\)", r"needs \d+ devices: .+", r"the runner has no .+",
    r".+ is the library's own, on torch's CPU, and is right", r"\w+ takes one decode step a message.*",
    r"\w+ has no .+", r"the same bits in any batch are not declared; .+",
    r"no recording was given \(--shapes FILE\)")))


def verify(path: str) -> tuple[str, list[str]]:
    """A report's verdict, and what is wrong with the report; nothing if it may be relied on. Raises ConfigError: the
    file is no report, or comes from a version of the kit that this library does not know."""
    data = report.read(path)
    listed = must_pass.read(data["header"].get("kit", "none"))
    return data["verdict"], [*_run(data, listed), *_cases(data, listed), *_reasons(data, listed), *_numbers(data)]


def _run(data: dict[str, Any], listed: dict[str, Any]) -> Iterator[str]:
    header, capabilities = data["header"], data["capabilities"]
    yield from (f"the header lacks {name!r}" for name in _HEADER if not header.get(name))
    if data["partial"] or header.get("level") != f"L{len(LEVELS) - 1}":
        yield f"only a part of the kit ran (level {header.get('level')})"
    for number, other in enumerate(data.get("runs", ()), 1):
        yield from (f"run {number} had another {name} than the header says: {other.get(name)}"
                    for name in differing(header, other))
    if data["must_pass"] != must_pass.digest(listed):
        yield (f"the run had another list of cases than kit {listed['kit']} has: digest {data['must_pass']}, expected "
               f"{must_pass.digest(listed)}")
    if capabilities.get("contracts") != listed["contracts"]:
        yield (f"the backend is written for contracts {capabilities.get('contracts')}, the list for "
               f"{listed['contracts']}")
    if data["dtypes"] != capabilities.get("dtypes"):
        yield f"not every declared dtype ran: {data['dtypes']} of {capabilities.get('dtypes')}"


def _cases(data: dict[str, Any], listed: dict[str, Any]) -> Iterator[str]:
    """Each case of the list once, for each dtype that it depends on."""
    wanted = [(name, dtype) for name, case in listed["cases"].items()
              for dtype in ((ONCE,) if case["once"] else data["dtypes"])]
    found = [(r["case"], r["dtype"]) for r in data["results"]]
    yield from (f"{name} ({dtype}) is missing" for name, dtype in wanted if (name, dtype) not in found)
    yield from (f"{name} ({dtype}) is not on the list, or is there twice" for name, dtype in dict.fromkeys(found)
                if (name, dtype) not in wanted or found.count((name, dtype)) > 1)
    for r in data["results"]:
        case = listed["cases"].get(r["case"])
        if case is not None and (r["level"], r["area"]) != (case["level"], case["area"]):
            yield f"{r['case']} stands under another level or area than on the list"
        if r["status"] not in _STATUSES:
            yield f"{r['case']} ({r['dtype']}) ended as {r['status']!r}, which is no outcome"
        if f"--case {r['case']} " not in r["command"] or f"--seed {data['header'].get('seed')} " not in r["command"]:
            yield f"{r['case']} ({r['dtype']}) was run by another command: {r['command']}"


def _reasons(data: dict[str, Any], listed: dict[str, Any]) -> Iterator[str]:
    capabilities = data["capabilities"]
    has = {"tp": capabilities.get("max_tp", 1) > 1, "pp": capabilities.get("max_pp", 1) > 1,
           "batch_invariant": capabilities.get("batch_invariant", "no") != "no"}
    for r in data["results"]:
        name, text = f"{r['case']} ({r['dtype']})", r["text"]
        needs = listed["cases"].get(r["case"], {"needs": []})["needs"]
        lacking = [need for need in needs if not has.get(need, capabilities.get(need))]
        if r["status"] == "n/a" and text.startswith(_UNDECLARED):
            if text != _UNDECLARED + ", ".join(lacking) or not lacking:
                yield f"{name} is not applicable for a lack that the capabilities do not show: {text}"
        elif r["status"] == "n/a" and not any(reason.fullmatch(text) for reason in _REASONS):
            yield f"{name} is not applicable for no reason that the kit gives: {text or 'none'}"
        elif r["status"] != "n/a" and lacking:
            yield f"{name} needs {', '.join(lacking)}, which the backend does not declare, and ended as {r['status']}"
        elif r["status"] == "pass" and text:
            yield f"{name} passes, with the text of another outcome: {text}"
        elif r["status"] == "xfail" and not (text and r["link"].startswith(("http://", "https://"))):
            yield f"{name} is an expected failure without a reason or a link"


def _numbers(data: dict[str, Any]) -> Iterator[str]:
    """What follows from the results follows from them here, too; and errors stay within the tolerances."""
    again = report.loaded(data)
    if data["verdict"] != again.verdict:
        yield f"the verdict is not that of the results: {data['verdict']!r}, they give {again.verdict!r}"
    if data["levels"] != {d: {f"L{n}": again.cell(n, d) for n in range(len(LEVELS))} for d in again.dtypes}:
        yield "the counts by level are not those of the results"
    try:
        tolerances = Tolerances.parse(data["header"].get("widened tolerances", "").split())
    except ConfigError as error:
        yield f"the widened tolerances cannot be read: {error}"
        return
    measured = {(e["operation"], e["dtype"]) for e in data["errors"]}
    for e in data["errors"]:
        name = f"{e['operation']}, {e['dtype']}"
        if e["dtype"] not in TOLERANCES.get(e["operation"], {}):
            yield f"the kit has no such operation: {name}"
        elif e["tolerance"] != tolerances(e["operation"], e["dtype"]):
            yield f"the tolerance of {name} was {e['tolerance']}, which the header does not say"
        elif not e["worst"] <= e["tolerance"] and not again.failed and "xfail" not in (r.status for r in again.results):
            yield f"the worst error of {name} is {e['worst']}, beyond its tolerance, and no case failed"
    for r in again.results:
        operation = {"L2/linear/linear": "linear", "L2/attention/decode": "attention"}.get(r.case.name)
        if operation and r.status == "pass" and (operation, r.dtype) not in measured:
            yield f"{r.case.name} ({r.dtype}) passes, and no error of it is there"
