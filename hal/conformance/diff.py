"""Two or more reports side by side: releases, devices or versions of torch."""

from __future__ import annotations

from html import escape
from typing import Any

from hal.conformance import report
from hal.conformance.html import STYLE, kind

_WORSE = 2.0  # times as large, from which a change of an operation's worst error is told


def diff(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is different, in lines: facts of the run, cases that are there once, outcomes, errors, seconds."""
    lines = []
    for name in dict.fromkeys((*before["header"], *after["header"])):
        old, new = (data["header"].get(name, "-") for data in (before, after))
        lines += [f"{name}: {old} -> {new}"] if old != new else []
    old_results, new_results = ({(r["case"], r["dtype"]): r for r in data["results"]} for data in (before, after))
    for key in dict.fromkeys((*old_results, *new_results)):
        old, new = (results.get(key) for results in (old_results, new_results))
        was, now = (r["status"] if r else "absent" for r in (old, new))
        if was != now:
            why = f": {new['text'].splitlines()[0]}" if new and new["text"] else ""
            lines.append(f"{key[0]} ({key[1]}): {was} -> {now}{why}")
    errors = [{(e["operation"], e["dtype"]): e["worst"] for e in data["errors"]} for data in (before, after)]
    for key in errors[0].keys() & errors[1].keys():
        was, now = errors[0][key], errors[1][key]
        if max(was, now) > _WORSE * min(was, now):
            lines.append(f"worst error of {key[0]} in {key[1]}: {was:.2g} -> {now:.2g}")
    spent = [sum(r["seconds"] for r in data["results"]) for data in (before, after)]
    return [*lines, f"seconds: {spent[0]:.1f} -> {spent[1]:.1f}", f"before: {before['verdict']}",
            f"after:  {after['verdict']}"]


def matrix(data: dict[str, Any]) -> list[list[str]]:
    """What a report that was read covers; see hal.conformance.report.coverage."""
    return report.coverage(report.loaded(data))


def page(reports: list[dict[str, Any]]) -> str:
    """Reports side by side as one HTML page: verdicts, then a line for each feature with each report's dtypes."""
    matrices = [{row[0]: row[1:] for row in matrix(data)[1:]} for data in reports]
    features = list(dict.fromkeys(name for rows in matrices for name in rows))
    lines = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>",
             "<meta name='viewport' content='width=device-width, initial-scale=1'>",
             f"<title>Conformance, side by side</title><style>{STYLE}</style></head><body>",
             "<h1>Conformance, side by side</h1><div class='wide'><table><tr><th></th>",
             *(f"<th colspan='{len(d['dtypes'])}'>{escape(d['header'].get('backend', '?'))}</th>" for d in reports),
             "</tr><tr><th>verdict</th>",
             *(f"<td colspan='{len(d['dtypes'])}'>{escape(d['verdict'])}</td>" for d in reports),
             "</tr><tr><th>feature</th>", *(f"<th>{escape(t)}</th>" for d in reports for t in d["dtypes"]), "</tr>"]
    for feature in features:
        cells = [cell for d, rows in zip(reports, matrices, strict=True)
                 for cell in rows.get(feature, ["-"] * len(d["dtypes"]))]
        lines.append(f"<tr><td><code>{escape(feature)}</code></td>" + "".join(
            f"<td class='{kind(cell)}'>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table></div></body></html>"])
