"""The report as one page without other files: the table in colours, failures, and the errors of each operation."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from hal.conformance.case import LEVELS
from hal.conformance.report import cell, coverage
from hal.conformance.run import Report, Result
from hal.conformance.speed import Speed

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1d2430 }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.verdict { font-size: 1.2rem; font-weight: 600; padding: .6rem 1rem; border-left: 6px solid #2b8a5a;
background: #eef7f2 }
.verdict.bad { border-color: #c0392b; background: #fbeeec }
table { border-collapse: collapse; margin: .8rem 0 }
th, td { padding: .35rem .8rem; border: 1px solid #d5dae3; text-align: left }
th { background: #f3f5f9 } td.pass { background: #dff2e7 } td.bad { background: #f8d9d5 }
td.na { background: #eceff4; color: #667 } td.xfail { background: #fcf0cf }
code { background: #f3f5f9; padding: .1rem .3rem; border-radius: 3px; font-size: .85em; overflow-wrap: anywhere }
pre { background: #f3f5f9; padding: .6rem; overflow-x: auto; white-space: pre-wrap; font-size: .82rem }
.plots { display: flex; flex-wrap: wrap } figure { width: 320px; margin: 0 1.5rem 1.5rem 0 }
.note { color: #667; font-size: .9rem } details { margin: .4rem 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .8rem 0 }
dt { color: #667 } dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto }
.key { padding: 0 .5rem; border: 1px solid #d5dae3; white-space: nowrap } .key.pass { background: #dff2e7 }
.key.bad { background: #f8d9d5 } .key.na { background: #eceff4 }
.sides { border: solid #d5dae3; border-width: 1px 0 0 1px; border-collapse: separate; border-spacing: 0 }
.sides th, .sides td { border-width: 0 1px 1px 0 } .sides td { min-width: 3.5rem }
.sides th:first-child { position: sticky; left: 0 } .sides code { background: none; padding: 0; font-weight: 400;
overflow-wrap: normal } .level th { background: #e3e8f1 } .level span { position: sticky; left: .8rem }
@media (max-width: 40rem) {
body { margin: 1rem auto } th, td { padding: .25rem .4rem; font-size: .85rem }
dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem } figure { width: 100%; margin-right: 0 }
}
"""
_LOW, _HIGH, _WIDTH, _HEIGHT = -10, 1, 320, 130  # decades shown; pixels


def html(report: Report) -> str:
    bad = bool(report.failed)
    parts = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>",
             "<meta name='viewport' content='width=device-width, initial-scale=1'>",
             f"<title>Conformance of {escape(report.header['backend'])}</title><style>{STYLE}</style></head><body>",
             f"<h1>Conformance of {escape(report.header['backend'])}</h1>",
             f"<p class='verdict{' bad' if bad else ''}'>{escape(report.verdict)}</p>", _table(report)]
    parts += [_coverage(report), section("Failures", report, ("fail", "error"), opened=True),
              section("Expected failures", report, ("xfail",), opened=True)]
    if report.errors:
        plots = "".join(histogram(f"{op}, {dtype}", np.concatenate(found), report.tolerances(op, dtype))
                        for (op, dtype), found in sorted(report.errors.items()))
        parts.append("<h2>Errors by operation</h2><p class='note'>|got - expected| / (1 + |expected|) against fp64, "
                     "elements by decade on a logarithmic count; the red line is the tolerance. Exact results are at "
                     f"the left edge.</p><div class='plots'>{plots}</div>")
    if report.speed:
        parts.append(_figures(
            "Speed", "No part of the verdict. Shares are of the bandwidth or matrix rate that was measured in the same "
            "process.", ("what", "dtype", "ms", "share"),
            [f"<td>{escape(s.name)}</td><td>{escape(s.dtype)}</td><td>{s.seconds * 1e3:.4g}</td>"
             f"<td class='{_reached(s)}'>{_share(s)}</td>" for s in report.speed]))
    if report.tasks:
        parts.append(_figures(
            "Tasks", "Right answers; no part of the verdict.", ("how", "dtype", "right"),
            [f"<td>{escape(a.how)}</td><td>{escape(a.dtype)}</td>"
             f"<td>{escape(a.refused) or f'{a.right} of {a.total}'}</td>" for a in report.tasks]))
    parts += [section("Not applicable", report, ("n/a",)), section("Passed", report, ("pass",)), "<h2>Run</h2><dl>"]
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.header.items()]
    return "\n".join([*parts, "</dl></body></html>"])


def _figures(title: str, note: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A section that is a table; `rows` are cells already."""
    lines = "".join(f"<tr>{row}</tr>" for row in ("".join(f"<th>{head}</th>" for head in heads), *rows))
    return f"<h2>{title}</h2><p class='note'>{note}</p><div class='wide'><table>{lines}</table></div>"


def _table(report: Report) -> str:
    lines = ["<div class='wide'><table><tr><th>level</th>",
             "".join(f"<th>{escape(d)}</th>" for d in report.dtypes) + "</tr>"]
    for level in sorted({r.case.level for r in report.results}):
        cells = []
        for dtype in report.dtypes:
            counts = report.cell(level, dtype)
            kind = "bad" if counts.keys() & {"fail", "error"} else "xfail" if "xfail" in counts else (
                "pass" if "pass" in counts else "na")
            cells.append(f"<td class='{kind}'>{escape(cell(report, level, dtype))}</td>")
        lines.append(f"<tr><th>L{level} {LEVELS[level]}</th>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table></div><p class='note'>Passes of what is applicable; what is not applicable is "
                      "no pass.</p>"])


def _reached(s: Speed) -> str:
    return "" if s.least is None else "pass" if (s.share or 0.0) >= s.least else "xfail"


def _share(s: Speed) -> str:
    declared = "" if s.least is None else f" of {s.least:g} declared"
    return ("" if s.share is None else f"{s.share:.2f}") + declared


def kind(cell: str) -> str:
    """The class of a cell of `coverage`."""
    passes, _, applicable = cell.partition("/")
    return "na" if cell == "-" else "pass" if passes == applicable else "bad"


def _coverage(report: Report) -> str:
    (_, *dtypes), *lines = coverage(report)
    rows = "".join(f"<tr><td><code>{escape(name)}</code></td>" + "".join(
        f"<td class='{kind(cell)}'>{cell}</td>" for cell in cells) + "</tr>" for name, *cells in lines)
    return ("<h2>Coverage</h2><details><summary>by feature, topology and dtype</summary><div class='wide'><table><tr>"
            f"<th>feature</th>{''.join(f'<th>{escape(d)}</th>' for d in dtypes)}</tr>{rows}</table></div></details>")


def section(title: str, report: Report, statuses: tuple[str, ...], opened: bool = False) -> str:
    found = [r for r in report.results if r.status in statuses]
    if not found:
        return ""
    return f"<h2>{title} ({len(found)})</h2>" + "".join(_entry(r, opened) for r in found)


def _entry(r: Result, opened: bool) -> str:
    link = f" <a href='{escape(r.link, quote=True)}'>{escape(r.link)}</a>" if r.link else ""
    text = f"<pre>{escape(r.text)}</pre>" if r.text else ""
    return (f"<details{' open' if opened else ''}><summary><code>{escape(r.case.name)}</code> ({escape(r.dtype)}, "
            f"{r.seconds:.1f} s) {escape(r.case.doc)}{link}</summary>{text}<p class='note'>to repeat: "
            f"<code>{escape(r.command)}</code></p></details>")


def histogram(title: str, errors: np.ndarray, tolerance: float) -> str:
    """An SVG: elements by decade of their error (a quarter of a decade a bar)."""
    bins = (_HIGH - _LOW) * 4
    decades = np.clip(np.log10(np.maximum(errors, 10.0**_LOW)), _LOW, _HIGH - 1e-6)
    counts, _ = np.histogram(decades, bins, (_LOW, _HIGH))
    heights, step = np.log10(counts + 1) / np.log10(max(counts.max(), 1) + 1) * (_HEIGHT - 8), _WIDTH / bins
    bars = "".join(f"<rect x='{i * step:.1f}' y='{_HEIGHT - h:.1f}' width='{step - .6:.1f}' height='{h:.1f}' "
                   "fill='#4a7fc1'/>" for i, h in enumerate(heights) if h)
    at = (np.log10(tolerance) - _LOW) / (_HIGH - _LOW) * _WIDTH
    labels = "".join(f"<text x='{(d - _LOW) / (_HIGH - _LOW) * _WIDTH:.0f}' y='{_HEIGHT + 14}' font-size='10' "
                     f"fill='#667' text-anchor='middle'>1e{d}</text>" for d in range(_LOW + 1, _HIGH, 3))
    return (f"<figure><figcaption><b>{escape(title)}</b><br/><span class='note'>worst "
            f"{errors.max():.2g} of {tolerance:g} allowed, median {np.median(errors):.2g}, {len(errors):,} elements"
            f"</span></figcaption><svg viewBox='0 0 {_WIDTH} {_HEIGHT + 18}' width='100%' role='img' "
            f"aria-label='{escape(title, quote=True)}'>"
            f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#f7f9fc'/>{bars}<line x1='{at:.1f}' x2='{at:.1f}' y1='0' "
            f"y2='{_HEIGHT}' stroke='#c0392b' stroke-width='2'/>{labels}</svg></figure>")
