"""hal conformance: say whether a backend is right, and how far"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal import files
from hal.cli import options
from hal.config import BUNDLED_MODEL
from hal.errors import ConfigError

if TYPE_CHECKING:
    from hal.conformance.run import Report, Result

EPILOG = """levels (each includes those before it):
  L0 registration and capabilities   L1 input contracts   L2 operations against fp64   L3 a tiny model in every way
  L4 graphs and buckets              L5 distributed       L6 replay and guard

examples:
  hal conformance --backend cpu                              everything; exit code 1 when anything fails
  hal conformance --backend mypackage:backend --level 3 --report out
  hal conformance --backend cpu --case 'L2/attention/*' --dtype bfloat16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="a backend's name, or module:attribute")
    parser.add_argument("--level", type=int, choices=range(7), default=6, metavar="N",
                        help="highest level (default: 6)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N",
                        help="of weights, prompts and examples (default: 0)")
    parser.add_argument("--examples", type=options.positive, default=25, metavar="N",
                        help="that each property is tried on (default: 25)")
    parser.add_argument("--report", type=options.path, metavar="DIR",
                        help="write report.md, report.html, report.json and junit.xml there")
    parser.add_argument("--resume", type=options.path, metavar="REPORT",
                        help="a report.json, or its folder: cases that it has passed do not run again, if backend, "
                             "versions, seed and examples are the same")
    parser.add_argument("--case", action="append", metavar="NAME", help="only these; * matches anything; repeatable")
    parser.add_argument("--dtype", action="append", metavar="NAME", help="only these of those declared; repeatable")
    parser.add_argument("--xfail", type=options.path, metavar="FILE",
                        help="TOML or JSON of expected failures: case, reason, link, dtype")
    parser.add_argument("--tolerance", action="append", default=[], metavar="OP:DTYPE=X",
                        help="widen an entry of the table; the report says so; repeatable")
    parser.add_argument("--speed", type=options.path, nargs="?", const="", metavar="FILE",
                        help="also measure level S, which is no part of the verdict; FILE is JSON of the least shares "
                             "that the vendor declares")
    parser.add_argument("--shapes", type=options.path, metavar="FILE",
                        help="a recording, whose lengths and arrivals one case repeats")
    parser.add_argument("--tasks", type=options.path, nargs="?", const="", metavar="FILE",
                        help="also count right answers by dtype, format and topology: of the bundled model's held-out "
                             "problems, or of FILE, JSONL with prompt and answer")
    parser.add_argument("--tasks-model", type=options.path, metavar="DIR", help="the model that answers FILE's prompts")
    parser.add_argument("--list", action="store_true", help="print the cases, and those not written yet, and end")
    parser.add_argument("--verify", type=options.path, metavar="FILE",
                        help="say whether a report.json is complete and consistent, and end")
    parser.add_argument("--diff", type=options.path, nargs="+", metavar="FILE",
                        help="compare the first report.json with each other one, and end; with --report DIR also write "
                             "a page with all of them side by side")


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**63 - 1")
    return value


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("hypothesis") is None:
        raise ConfigError("the conformance kit needs hypothesis", hint="pip install 'hal-runtime[test]'")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: ranks would spin for each other's cores
    from hal.conformance.case import all_cases
    from hal.conformance.must_pass import UNWRITTEN

    if args.list:
        for case in all_cases():
            print(f"{case.name:<48} {case.doc}")
        for text in UNWRITTEN:
            print(f"not written yet: {text}")
        return 0
    if args.verify:
        return _verify(args.verify)
    if args.diff:
        return _diff(args.diff, args.report)
    if args.backend is None:
        args.usage_error("give --backend NAME")
    from hal.conformance import report as reports
    from hal.conformance import run as kit
    from hal.conformance.speed import read_thresholds
    from hal.conformance.tasks import HELD_OUT, read_problems
    from hal.testing.tolerance import Tolerances

    thresholds = None if args.speed is None else read_thresholds(args.speed) if args.speed else {}
    problems = None if args.tasks is None else read_problems(args.tasks or str(HELD_OUT))
    for name in reports.FILES if args.report else ():
        files.check_writable("--report", Path(args.report) / name)
    asked = kit.Options(args.backend, args.level, args.seed, args.examples, tuple(args.case or ("*",)),
                        tuple(args.dtype or ()), args.xfail, Tolerances.parse(args.tolerance),
                        args.shapes, (problems, args.tasks_model or str(BUNDLED_MODEL)) if problems else None,
                        thresholds, _earlier(args.resume) if args.resume else None)
    so_far: list[Report] = []

    def progress(report: Report, result: Result | None) -> None:
        so_far[:] = [report]
        if result is not None:
            if args.report:  # for --resume, should the run be killed
                reports.write(report, Path(args.report), ("report.json",))
            _show(result)

    try:
        report = kit.run(asked, progress)
    except KeyboardInterrupt:
        for report in so_far:
            print(reports.unfinished(report), file=sys.stderr)
        raise
    if args.report:
        reports.write(report, Path(args.report))
    print("\n".join(f"{name}: {value}" for name, value in report.header.items()), end="\n\n")
    print(reports.terminal(report))
    return int(bool(report.failed))


def _verify(path: str) -> int:
    from hal.conformance.verify import verify

    verdict, wrong = verify(path)
    print("\n".join([*wrong, "", f"{path} may not be relied on: {len(wrong)} faults"]) if wrong
          else f"{path} is complete and consistent\n{verdict}")
    return int(bool(wrong))


def _diff(paths: list[str], directory: str | None) -> int:
    from hal.conformance import diff
    from hal.conformance.report import read, table

    page = Path(directory) / "side-by-side.html" if directory else None
    if page is not None:
        files.check_writable("--report", page)
    reports = [read(path) for path in paths]
    for path, other in zip(paths[1:], reports[1:], strict=True):
        print("\n".join([f"{paths[0]} -> {path}", *(f"  {line}" for line in diff.diff(reports[0], other)), ""]))
    for path, found in zip(paths, reports, strict=True):
        print(f"{path}\n{table(diff.matrix(found))}\n")
    if page is not None:
        with files.replacing(page) as temporary:
            temporary.write_text(diff.page(reports), encoding="utf-8")
    return 0


def _earlier(path: str) -> dict[str, Any]:
    from hal.conformance.report import read

    return read(str(Path(path) / "report.json") if Path(path).is_dir() else path)


def _show(result: Result) -> None:
    print(f"{result.status:<5} {result.seconds:6.1f} s  {result.case.name} ({result.dtype})", file=sys.stderr,
          flush=True)
