"""Run cases against a backend, and judge."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hal.conformance import KIT_VERSION, speed, tasks
from hal.conformance.case import LEVELS, Case, Mismatch, NotApplicable, Status, all_cases
from hal.conformance.context import Context
from hal.conformance.speed import Speed
from hal.conformance.tasks import Accuracy, Problem
from hal.contracts import backend as backends
from hal.contracts.backend import Backend
from hal.errors import ConfigError, HalError
from hal.testing.tolerance import Tolerances

_CHILD = "HAL_CONFORMANCE_CHILD"
ONCE = "any"  # the dtype of a case that does not depend on one


@dataclass(frozen=True, slots=True)
class Expected:
    """A failure that a vendor declares: cases and dtypes as globs, the reason, and a link to its issue."""

    case: str
    reason: str
    link: str
    dtype: str = "*"

    def covers(self, case: str, dtype: str) -> bool:
        return fnmatch.fnmatch(case, self.case) and fnmatch.fnmatch(dtype, self.dtype)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a run. `device` names the backend; `cases` are globs; `dtypes` are among the declared ones."""

    device: str
    level: int = 6
    seed: int = 0
    examples: int = 25
    cases: tuple[str, ...] = ("*",)
    dtypes: tuple[str, ...] = ()
    expected_file: str | None = None
    tolerances: Tolerances = field(default_factory=Tolerances)
    shapes: str | None = None  # a recording whose shapes a case repeats
    tasks: tuple[list[Problem], str] | None = None  # with the model that answers them
    speed: dict[str, float] | None = None  # level S runs, with these least shares that the vendor declares
    resume: dict[str, Any] | None = None  # an earlier report, as hal.conformance.report.read gives it

    def command(self, case: str, dtype: str) -> str:
        """The command that repeats one result."""
        chosen = "" if dtype == ONCE else f" --dtype {dtype}"
        xfail = f" --xfail {shlex.quote(self.expected_file)}" if self.expected_file else ""
        xfail += f" --shapes {shlex.quote(self.shapes)}" if self.shapes else ""
        return (f"hal conformance --backend {shlex.quote(self.device)} --case {case}{chosen} --seed {self.seed} "
                f"--examples {self.examples}{xfail}{self.tolerances.options()}")


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a case in one dtype. `text` is the reason if it is not a pass; an expected failure has a `link`."""

    case: Case
    dtype: str
    status: Status
    text: str
    seconds: float
    command: str
    link: str = ""


@dataclass
class Report:
    """Attributes:
        header: facts about the run and the machine. results: in the order in which the cases ran.
        errors: (operation, dtype) -> all measured errors.
        partial: some cases have not run, so there is no verdict. running: the case that runs now, and its dtype.
        runs: the headers of all runs, if there were several. earlier_errors: those of the runs before, as JSON.
        late: by case, the programs that its steps have made after a warm-up.
        capabilities: what the backend declares, as JSON holds it.
        speed: of level S, and tasks: accuracies, if they were asked for.
    """

    header: dict[str, str]
    dtypes: tuple[str, ...]
    results: list[Result] = field(default_factory=list)
    errors: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    tolerances: Tolerances = field(default_factory=Tolerances)
    partial: bool = False
    capabilities: dict[str, Any] = field(default_factory=dict)
    speed: list[Speed] = field(default_factory=list)
    tasks: list[Accuracy] = field(default_factory=list)
    running: str = ""
    runs: list[dict[str, str]] = field(default_factory=list)
    earlier_errors: list[dict[str, Any]] = field(default_factory=list)
    late: dict[str, list[str]] = field(default_factory=dict)

    def cell(self, level: int, dtype: str) -> dict[str, int]:
        """The number of cases of a level by outcome, for a dtype. Cases without a dtype count for every dtype."""
        found = [r.status for r in self.results if r.case.level == level and r.dtype in (dtype, ONCE)]
        return {s: found.count(s) for s in ("pass", "fail", "xfail", "n/a", "error") if s in found}

    @property
    def failed(self) -> list[Result]:
        return [r for r in self.results if r.status in ("fail", "error")]

    def level(self, dtype: str) -> int:
        """The highest level that passes, together with all levels before it, or -1. A level passes when no case fails
        and at least one passes. A level without an applicable case is skipped: it does not count as a pass."""
        reached = -1
        for level in range(len(LEVELS)):
            cell = self.cell(level, dtype)
            if cell.get("fail") or cell.get("error") or not cell:
                break
            reached = level if cell.get("pass") else reached
        return reached

    @property
    def verdict(self) -> str:
        """Such as "Conformant L6 (bfloat16, float32); n/a: L2 12 of 17, L5 14 of 14"."""
        if self.partial:
            return f"No verdict from some cases alone: {len(self.failed)} of {len(self.results)} failed"
        by_level: dict[int, list[str]] = {}
        for dtype in self.dtypes:
            by_level.setdefault(self.level(dtype), []).append(dtype)
        parts = [f"{'Conformant L' + str(level) if level >= 0 else 'Not conformant'} ({', '.join(by_level[level])})"
                 for level in sorted(by_level, reverse=True)]
        best = max(by_level, default=-1)
        lacking = [f"L{n} {found.count('n/a')} of {len(found)}" for n in range(best + 1)
                   if "n/a" in (found := [r.status for r in self.results if r.case.level == n])]
        text = ", ".join(parts) + (f"; n/a: {', '.join(lacking)}" if lacking else "")
        expected = sum(r.status == "xfail" for r in self.results)
        text += f"; {expected} expected failures" if expected else ""
        return text + (f"; from {len(self.runs)} runs" if len(self.runs) > 1 else "")


def read_expected(path: str) -> list[Expected]:
    """Read a vendor's file of expected failures: TOML ([[xfail]] tables) or JSON ({"xfail": [...]}) with case, reason,
    link and, if only one dtype fails, dtype.

    Raises:
        ConfigError: the file cannot be read, or an entry lacks a reason or a link.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".toml"):
            import tomllib  # Python 3.11

            data: Any = tomllib.loads(text)
        else:
            data = json.loads(text)
        found = [Expected(**entry) for entry in data["xfail"]]
        wrong = [value for entry in data["xfail"] for value in entry.values() if not isinstance(value, str)]
        if wrong:
            raise TypeError(f"{wrong[0]!r} is not a text")
        return found
    except (OSError, ImportError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError("the file of expected failures cannot be used", got=f"{path}: {error}",
                          expected="xfail entries with case, reason, link, and dtype where one alone fails") from None


class Kit:
    """A backend with the options of a run.

    Raises:
        BackendError: the backend does not load, or is not available here. ConfigError: no case or dtype is left.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.backend = options, backends.select(options.device)
        self.expected = read_expected(options.expected_file) if options.expected_file else []
        declared = self.backend.capabilities.dtypes
        unknown = set(options.dtypes) - set(declared)
        if unknown:
            raise ConfigError("the backend does not declare this dtype", got=", ".join(sorted(unknown)),
                              expected=", ".join(declared))
        self.dtypes = tuple(d for d in declared if not options.dtypes or d in options.dtypes)
        self.errors: dict[tuple[str, str], list[np.ndarray]] = {}
        self.late: dict[str, list[str]] = {}  # by case, the programs that its steps have made after a warm-up

    def work(self, cases: tuple[str, ...] = ()) -> list[tuple[Case, str]]:
        """The chosen cases by level, each with its dtypes. `cases`: globs, in place of those of the options."""
        options = self.options
        chosen = [c for c in all_cases() if c.level <= options.level
                  and any(fnmatch.fnmatch(c.name, p) for p in cases or options.cases)]
        if not chosen:
            raise ConfigError("no case has this name", got=", ".join(options.cases),
                              hint="`hal conformance --list`")
        return [(c, d) for c in chosen for d in ((ONCE,) if c.once else self.dtypes)]

    def result(self, case: Case, dtype: str, scratch: Path) -> Result:
        options = self.options
        context = Context(self.backend, options.device, self.dtypes[0] if dtype == ONCE else dtype, options.seed,
                          name=case.name, examples=options.examples, tolerances=options.tolerances, scratch=scratch,
                          errors=self.errors, late=self.late, shapes=options.shapes)
        start = time.perf_counter()
        several = case.level == 5 or "tp" in case.needs
        apart = (case.alone or (several and self.backend.capabilities.spmd)) and _CHILD not in os.environ
        status, text = self._apart(case, dtype, scratch) if apart else outcome(case, context)
        known = next((e for e in self.expected if e.covers(case.name, dtype)), None)
        if known and status == "fail":
            status, text = "xfail", f"{known.reason} ({text})"
        elif known and status == "pass":
            status, text = "fail", f"it was expected to fail, and passes: {known.reason}"
        return Result(case, dtype, status, text, time.perf_counter() - start, options.command(case.name, dtype),
                      known.link if known else "")

    def _apart(self, case: Case, dtype: str, scratch: Path) -> tuple[Status, str]:
        """Run a case in a process of its own. A compiler keeps its programs, and shards tensors over devices, for a
        whole process."""
        report = scratch / "apart"
        words = shlex.split(self.options.command(case.name, self.dtypes[0] if dtype == ONCE else dtype))[1:]
        done = subprocess.run([sys.executable, "-m", "hal", *words, "--report", str(report)], capture_output=True,
                              encoding="utf-8", errors="replace",
                              env={**os.environ, _CHILD: "1", "PYTHONPATH": os.pathsep.join(sys.path)})
        try:
            found = next(r for r in json.loads((report / "report.json").read_text())["results"])
        except (OSError, ValueError, StopIteration):
            return "error", f"exit status {done.returncode}: {done.stderr[-1000:]}"
        shutil.rmtree(report)
        return found["status"], found["text"]


def run(options: Options, progress: Callable[[Report, Result | None], None] = lambda *_: None) -> Report:
    """All chosen cases in this process, but those that `options.resume` has passed already. `progress` gets the report
    so far when a case begins (`running`), and again with the result when it has ended. Raises as Kit, and ConfigError:
    the earlier report is of another run."""
    from hal.conformance.resume import code, resume, settled

    kit = Kit(options)
    report = Report({**header(kit.backend, options), "code": code(kit.backend)}, kit.dtypes, errors=kit.errors,
                    tolerances=options.tolerances, partial=True, capabilities=declared(kit.backend), late=kit.late)
    found = {} if options.resume is None else resume(kit, report, options.resume)
    whole = [(case.name, dtype) for case, dtype in kit.work(("*",))]
    with tempfile.TemporaryDirectory(prefix="hal-conformance-") as scratch:
        with strict():
            for case, dtype in kit.work():
                if settled(kit, found, case, dtype):
                    continue
                report.running = f"{case.name} ({dtype})"
                progress(report, None)
                found[case.name, dtype] = result = kit.result(case, dtype, Path(scratch))
                report.results, report.running = [found[key] for key in whole if key in found], ""
                progress(report, result)
        report.results, report.partial = [found[key] for key in whole if key in found], len(found) < len(whole)
        for dtype in () if options.speed is None else kit.dtypes:  # without the checks, which cost time
            report.speed += speed.measure(Context(kit.backend, options.device, dtype, options.seed, name="speed",
                                                  scratch=Path(scratch)), options.speed or {})
    if options.tasks is not None:
        problems, model = options.tasks
        report.tasks += tasks.measure(options.device, kit.backend, kit.dtypes, problems, model)
    return report


def outcome(case: Case, context: Context) -> tuple[Status, str]:
    """The outcome of a case, and the reason if it does not pass."""
    missing = case.missing(context.backend)
    if missing:
        return "n/a", missing
    try:
        case.check(context)
    except NotApplicable as reason:
        return "n/a", str(reason)
    except (Mismatch, HalError) as error:
        return "fail", f"{type(error).__name__}: {error}" if isinstance(error, HalError) else str(error)
    except Exception as error:
        where = _last_frame(error)
        return "error", f"{type(error).__name__}: {error}{where}"
    if context.own and not _is_ours(context.backend):
        return "n/a", f"{', '.join(sorted(set(context.own)))} is the library's own, on torch's CPU, and is right"
    return "pass", ""


def _is_ours(backend: Backend) -> bool:
    return type(backend).__module__.partition(".")[0] in ("hal", "runners")


def _last_frame(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" (in {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace else ""


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Context manager: all checks and the strict guard are on, in this process and in the ranks that it starts. Unless
    the environment says otherwise, each process uses one thread: tiny models gain nothing from more."""
    from hal import guard

    before, tier = dict(os.environ), guard.installed_tier()
    os.environ["HAL_STRICT"] = "1"
    if "OMP_NUM_THREADS" not in before:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    guard.install(strict=True)
    try:
        yield
    finally:
        for name in ("HAL_STRICT", "OMP_NUM_THREADS"):
            os.environ.pop(name)
            os.environ |= {name: before[name]} if name in before else {}
        if tier != "strict":
            guard.uninstall()
            if tier is not None:
                guard.install(strict=False)


def declared(backend: Backend) -> dict[str, Any]:
    """The capabilities as JSON gives them back: tuples become lists."""
    capabilities = backend.capabilities
    found: dict[str, Any] = json.loads(json.dumps({n: getattr(capabilities, n) for n in capabilities.__slots__}))
    return found


def header(backend: Backend, options: Options) -> dict[str, str]:
    """The facts that a reader needs to repeat the run."""
    found = {"backend": options.device, "kit": KIT_VERSION, "seed": str(options.seed), "level": f"L{options.level}",
             "examples": str(options.examples), "device": str(backend.device(0)), "python": platform.python_version(),
             "machine": platform.machine(), "capabilities": ", ".join(
                 f"{name}={getattr(backend.capabilities, name)}" for name in backend.capabilities.__slots__)}
    for package in ("hal-runtime", "torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    widened = options.tolerances.options().replace(" --tolerance ", " ").strip()
    return found | dict(backend.versions()) | ({"widened tolerances": widened} if widened else {})
