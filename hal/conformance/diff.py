"""Two or more reports side by side: releases, devices or versions of torch."""

from __future__ import annotations

from html import escape
from typing import Any

from hal.conformance import report
from hal.conformance.case import LEVELS
from hal.conformance.html import STYLE, kind, section
from hal.conformance.run import Report

_LEGEND = (("pass", "all pass"), ("bad", "some do not"), ("na", "-: none applies, or none ran"))
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
    """Reports side by side as one HTML page: verdicts, facts of the runs, then a line for each level and each feature
    with each report's dtypes, and the failures."""
    found = [report.loaded(data) for data in reports]
    matrices = [{row[0]: row[1:] for row in report.coverage(each)[1:]} for each in found]
    columns, facts = 1 + sum(len(each.dtypes) for each in found), _facts(found)
    alike = [f"{name} {texts[0]}" for name, texts in facts.items() if len({*texts}) == 1]
    others = {name: texts for name, texts in facts.items() if len({*texts}) > 1}
    lines = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>",
             "<meta name='viewport' content='width=device-width, initial-scale=1'>",
             f"<title>Conformance, side by side</title><style>{STYLE}</style></head><body>",
             "<h1>Conformance, side by side</h1><p class='note'>A cell has the passes of the applicable cases. ",
             *(f"<span class='key {kind}'>{text}</span> " for kind, text in _LEGEND),
             f"</p><p class='note'>All runs have: {escape(', '.join(alike)) or 'no fact in common'}.</p>",
             "<div class='wide'><table class='sides'><tr><th></th>",
             *_spanning(found, [each.header.get("backend", "?") for each in found], "th"), "</tr>"]
    for name, texts in {"verdict": [data["verdict"] for data in reports], **others}.items():
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(_spanning(found, texts))}</tr>")
    lines += ["<tr><th>dtype</th>", *(f"<th>{escape(t)}</th>" for each in found for t in each.dtypes), "</tr>"]
    for level, title in enumerate(LEVELS):
        features = list(dict.fromkeys(n for rows in matrices for n in rows if n.startswith(f"L{level}/")))
        if features:
            lines.append(f"<tr class='level'><th colspan='{columns}'><span>L{level} {escape(title)}</span></th></tr>")
        for feature in features:
            cells = [cell for each, rows in zip(found, matrices, strict=True)
                     for cell in rows.get(feature, ["-"] * len(each.dtypes))]
            name = escape(feature.partition("/")[2]).replace("/", "/<wbr>").replace("_", "_<wbr>")
            lines.append(f"<tr><th><code>{name}</code></th>" + "".join(
                f"<td class='{kind(cell)}'>{escape(cell)}</td>" for cell in cells) + "</tr>")
    lines.append("</table></div>")
    lines += [section(f"Failures of {escape(each.header.get('backend', '?'))}", each, ("fail", "error"), opened=True)
              for each in found]
    return "\n".join([*lines, "</body></html>"])


def _facts(found: list[Report]) -> dict[str, list[str]]:
    """The facts of the runs by name, but those of one device alone and those that the page shows already."""
    names = dict.fromkeys(name for each in found for name in each.header)
    facts = {name: [each.header.get(name, "-") for each in found] for name in names}
    return {name: texts for name, texts in facts.items() if name not in ("backend", "capabilities", "code")
            and texts.count("-") < len(texts) - 1}


def _spanning(found: list[Report], texts: list[str], tag: str = "td") -> list[str]:
    """A cell for each report, as wide as its dtypes."""
    return [f"<{tag} colspan='{len(each.dtypes)}'>{escape(text)}</{tag}>"
            for each, text in zip(found, texts, strict=True)]
