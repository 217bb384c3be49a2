"""A report as a terminal table, Markdown, JSON and JUnit. The page with pictures is hal.conformance.html's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from hal import files
from hal.conformance import must_pass
from hal.conformance.case import LEVELS, Case
from hal.conformance.run import ONCE, Report, Result
from hal.errors import ConfigError

FILES = "report.md", "report.html", "report.json", "junit.xml"


def cell(report: Report, level: int, dtype: str) -> str:
    """A cell such as "12/12" or "11/12 fail 1 n/a 2": passes of the applicable cases, and the other outcomes."""
    counts = report.cell(level, dtype)
    applicable = sum(n for status, n in counts.items() if status != "n/a")
    others = " ".join(f"{status} {n}" for status, n in counts.items() if status != "pass")
    return " ".join(filter(None, (f"{counts.get('pass', 0)}/{applicable}" if applicable else "", others))) or "-"


def rows(report: Report) -> list[list[str]]:
    """The table: a header line, then a line for each level that ran."""
    ran = sorted({r.case.level for r in report.results})
    return [["level", *report.dtypes, "seconds"], *(
        [f"L{n} {LEVELS[n]}", *(cell(report, n, d) for d in report.dtypes),
         f"{sum(r.seconds for r in report.results if r.case.level == n):.1f}"] for n in ran)]


def table(rows: list[list[str]]) -> str:
    """Rows of equal length as text, in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def coverage(report: Report) -> list[list[str]]:
    """What is covered: a line for each area and, at L5, for each topology and control plane, a column for each dtype.
    A cell has the passes of the applicable cases, or "-" where none applies."""
    found: dict[str, list[str]] = {}
    for result in report.results:
        name = result.case.name if result.case.level == 5 else result.case.name.rpartition("/")[0]
        found.setdefault(name, [_passes(report, name, dtype) for dtype in report.dtypes])
    return [["feature", *report.dtypes], *([name, *cells] for name, cells in found.items())]


def _passes(report: Report, name: str, dtype: str) -> str:
    there = [r.status for r in report.results if r.dtype in (dtype, ONCE)
             and (r.case.name == name or r.case.name.rpartition("/")[0] == name)]
    applicable = [status for status in there if status != "n/a"]
    return f"{applicable.count('pass')}/{len(applicable)}" if applicable else "-"


def reasons(report: Report) -> list[str]:
    """Why cases were not applicable: each reason once, with its cases."""
    by_reason: dict[str, list[str]] = {}
    for r in report.results:
        if r.status == "n/a":
            by_reason.setdefault(r.text, []).append(r.case.name)
    return [f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in by_reason.items()]


def terminal(report: Report) -> str:
    lines = [table(rows(report))]
    for result in report.failed:
        lines += ["", f"{result.status.upper()} {result.case.name} ({result.dtype}): {result.case.doc}",
                  *("  " + line for line in result.text.splitlines()), f"  to repeat: {result.command}"]
    grouped = reasons(report)
    if grouped:
        lines += ["", "not applicable:", *(f"  {reason}" for reason in grouped)]
    if report.speed:
        lines += ["", "speed, which is no part of the verdict:", *(f"  {s.text}" for s in report.speed)]
    if report.tasks:
        lines += ["", "tasks, which are no part of the verdict:", *(f"  {a.text}" for a in report.tasks)]
    return "\n".join([*lines, "", report.verdict])


def unfinished(report: Report) -> str:
    """A run that was interrupted: the table so far, the failures, and the case that ran."""
    where = f"interrupted in {report.running}" if report.running else "interrupted between two cases"
    return f"{terminal(report)}\n{where}" if report.results else where


def markdown(report: Report) -> str:
    head, *body = rows(report)
    lines = [f"# Conformance of {report.header['backend']}", "", f"**{report.verdict}**", "",
             *(f"- {name}: {value}" for name, value in report.header.items()), "",
             "Passes of what is applicable; what is not applicable is no pass.", "",
             "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    for title, statuses in (("Failures", ("fail", "error")), ("Expected failures", ("xfail",))):
        found = [r for r in report.results if r.status in statuses]
        if found:
            lines += ["", f"## {title}", ""]
        for r in found:
            lines.append(f"- `{r.case.name}` ({r.dtype}): {r.text}" + (f" [{r.link}]({r.link})" if r.link else ""))
            if r.status in ("fail", "error"):
                lines.append(f"  Repeat with `{r.command}`.")
    grouped = reasons(report)
    if grouped:
        lines += ["", "## Not applicable", "", *(f"- {reason}" for reason in grouped)]
    if report.speed:
        lines += ["", "## Speed", "", "No part of the verdict.", "", *(f"- {s.text}" for s in report.speed)]
    if report.tasks:
        lines += ["", "## Tasks", "", "No part of the verdict.", "", *(f"- {a.text}" for a in report.tasks)]
    return "\n".join([*lines, ""])


def _result(r: Result) -> dict[str, Any]:
    return {"case": r.case.name, "level": r.case.level, "area": r.case.area, "dtype": r.dtype, "status": r.status,
            "text": r.text, "seconds": round(r.seconds, 3), "command": r.command, "link": r.link}


def _joined(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each operation and dtype. Of several runs, the largest median stands for the median."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for e in errors:
        first = found.setdefault((e["operation"], e["dtype"]), e)
        if first is not e:
            found[e["operation"], e["dtype"]] = {**e, "elements": first["elements"] + e["elements"], **{
                name: max(first.get(name, 0.0), e.get(name, 0.0)) for name in ("worst", "median")}}
    return list(found.values())


def as_json(report: Report) -> str:
    table = {d: {f"L{n}": report.cell(n, d) for n in range(len(LEVELS))} for d in report.dtypes}
    errors = [{"operation": op, "dtype": dtype, "elements": int(sum(map(len, found))),
               "worst": float(max(e.max() for e in found)), "median": float(np.median(np.concatenate(found))),
               "tolerance": report.tolerances(op, dtype)} for (op, dtype), found in report.errors.items()]
    errors = _joined([*report.earlier_errors, *errors])
    return json.dumps({"verdict": report.verdict, "header": report.header, "dtypes": report.dtypes,
                       "capabilities": report.capabilities, "must_pass": must_pass.digest(must_pass.current()),
                       "partial": report.partial, "levels": table, "errors": errors, "late": report.late,
                       "runs": report.runs,
                       "speed": [dataclasses.asdict(s) for s in report.speed],
                       "tasks": [dataclasses.asdict(a) for a in report.tasks],
                       "results": [_result(r) for r in report.results]}, indent=1)


def read(path: str) -> dict[str, Any]:
    """A report.json, of which the kinds of values are checked and nothing else; see hal.conformance.verify.

    Raises:
        ConfigError: there is no such file, or it is no report.
    """
    kinds: dict[str, type] = {"verdict": str, "header": dict, "dtypes": list, "capabilities": dict, "must_pass": str,
                              "partial": bool, "levels": dict, "errors": list, "results": list}
    entries: dict[str, dict[str, type | tuple[type, ...]]] = {
        "results": {"case": str, "level": int, "area": str, "dtype": str, "status": str, "text": str,
                    "seconds": (int, float), "command": str, "link": str},
        "errors": {"operation": str, "dtype": str, "elements": int, "worst": (int, float), "tolerance": (int, float)}}
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        wrong = [name for name, kind in kinds.items() if not isinstance(data[name], kind)]
        wrong += [f"{name}.{key}" for name, keys in entries.items() for entry in data[name]
                  for key, kind in keys.items() if not isinstance(entry[key], kind)]
        wrong += [name for name in ("header", "dtypes") for value in (*data[name], *(data["header"].values()))
                  if not isinstance(value, str)]
        wrong += ["runs" for run in data.get("runs", []) for fact in run.values() if not isinstance(fact, str)]
        wrong += ["late" for texts in data.get("late", {}).values() if not isinstance(texts, list)]
        if wrong:
            raise TypeError(f"{wrong[0]} has a value of another kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError("the report cannot be read", got=f"{path}: {type(error).__name__}: {error}",
                          expected="the report.json that `hal conformance --report DIR` wrote") from None
    return data


def loaded(data: dict[str, Any]) -> Report:
    """The report that `read` gave, without the measured errors."""
    def case(entry: dict[str, Any]) -> Case:
        return Case(entry["case"], entry["level"], entry["area"], _no_check, (), entry["dtype"] == ONCE, "")

    return Report(data["header"], tuple(data["dtypes"]), [
        Result(case(r), r["dtype"], r["status"], r["text"], float(r["seconds"]), r["command"], r["link"])
        for r in data["results"]], partial=data["partial"], capabilities=data["capabilities"],
        runs=data.get("runs", []))


def _no_check(context: object) -> None: ...


def junit(report: Report) -> str:
    by_status = {s: sum(r.status == s for r in report.results) for s in ("fail", "error", "xfail", "n/a")}
    suite = ElementTree.Element("testsuite", {
        "name": f"hal conformance {report.header['backend']}", "tests": str(len(report.results)),
        "failures": str(by_status["fail"]), "errors": str(by_status["error"]),
        "skipped": str(by_status["xfail"] + by_status["n/a"]), "time": f"{sum(r.seconds for r in report.results):.3f}"})
    for r in report.results:
        one = ElementTree.SubElement(suite, "testcase", {
            "classname": f"L{r.case.level}.{r.case.area}", "name": f"{r.case.name}[{r.dtype}]",
            "time": f"{r.seconds:.3f}"})
        tag = {"fail": "failure", "error": "error", "xfail": "skipped", "n/a": "skipped"}.get(r.status)
        if tag:
            text = "".join(c if c.isprintable() or c == "\n" else "?" for c in f"{r.text}\n{r.command}")
            ElementTree.SubElement(one, tag, {"message": text.split("\n")[0][:300]}).text = text
    # Python 3.10 would declare the locale's encoding.
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode")


def write(report: Report, directory: Path, only: tuple[str, ...] = FILES) -> list[Path]:
    """Write the report in all its forms, or in some, into a directory. Each file is written as a whole. Raises OSError.
    """
    from hal.conformance.html import html

    forms = dict(zip(FILES, (markdown, html, as_json, junit), strict=True))
    made = [directory / name for name in only]
    for path, text in ((path, forms[path.name](report)) for path in made):
        with files.replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return made
