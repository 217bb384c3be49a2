"""A report that was shortened or changed is noticed; two reports are compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hal.cli import main
from hal.conformance import must_pass, report
from hal.conformance.case import Case
from hal.conformance.diff import diff, matrix, page
from hal.conformance.run import ONCE, Options, Report, Result, declared
from hal.conformance.verify import verify
from hal.errors import ConfigError
from hal.testing.null import NullBackend
from hal.testing.tolerance import TOLERANCES

DTYPES = ("float32", "bfloat16")



def honest() -> dict[str, Any]:
    """What a run of a backend writes that passes all cases, and has neither pipeline stages nor swapping."""
    options = Options("vendor:backend")
    header = dict.fromkeys(("device", "python", "machine", "hal-runtime", "torch", "numpy"), "1")
    header |= {"backend": "vendor:backend", "kit": must_pass.KIT_VERSION, "seed": "0", "level": "L6", "examples": "25"}
    capabilities = declared(NullBackend()) | {"checkpoints": True, "swap": False, "asynchronous": True, "max_tp": 2,
                                              "max_pp": 1, "adapters": True, "embeddings": True,
                                              "dtypes": list(DTYPES)}
    lacking = {"swap", "pp"}
    results = []
    for name, entry in must_pass.current()["cases"].items():
        case = Case(name, entry["level"], entry["area"], lambda context: None, tuple(entry["needs"]), entry["once"], "")
        missing = [need for need in entry["needs"] if need in lacking]
        for dtype in (ONCE,) if case.once else DTYPES:
            text = f"the backend does not declare: {', '.join(missing)}" if missing else ""
            results.append(Result(case, dtype, "n/a" if missing else "pass", text, 0.5, options.command(name, dtype)))
    made: dict[str, Any] = json.loads(report.as_json(Report(header, DTYPES, results, capabilities=capabilities)))
    made["errors"] = [{"operation": op, "dtype": dtype, "elements": 10, "worst": TOLERANCES[op][dtype] / 4,
                       "median": 0.0, "tolerance": TOLERANCES[op][dtype]}
                      for op in ("linear", "attention") for dtype in DTYPES]
    return made


def found(data: dict[str, Any], tmp_path: Path) -> list[str]:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(data))
    return verify(str(path))[1]


def at(data: dict[str, Any], name: str, dtype: str = "float32") -> dict[str, Any]:
    return next(r for r in data["results"] if r["case"] == name and r["dtype"] == dtype)


DOCTORED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a case is removed": (lambda d: d["results"].remove(at(d, "L2/attention/window")), "window (float32) is missing"),
    "a case is there twice": (lambda d: d["results"].append(at(d, "L2/linear/linear")), "there twice"),
    "a count is edited": (lambda d: d["levels"]["float32"]["L2"].update({"pass": 99}), "counts by level"),
    "the verdict is edited": (lambda d: d.update(verdict="Conformant L6 (float32, bfloat16, float16)"), "verdict"),
    "a failure became n/a": (lambda d: at(d, "L3/model/llama").update(status="n/a"), "no reason that the kit gives"),
    "n/a for an invented reason": (lambda d: at(d, "L3/model/llama").update(status="n/a", text="not important"),
                                   "no reason that the kit gives"),
    "n/a for a capability that is there": (
        lambda d: at(d, "L5/layout/tp2").update(status="n/a", text="the backend does not declare: tp"),
        "a lack that the capabilities do not show"),
    "a failure became a pass": (lambda d: at(d, "L2/attention/window", "bfloat16").update(text="error 0.5 of 0.02"),
                                "with the text of another outcome"),
    "another kit's list": (lambda d: d.update(must_pass="0" * 16), "another list of cases"),
    "a hidden tolerance": (lambda d: d["errors"][0].update(tolerance=0.5), "which the header does not say"),
    "an error beyond the tolerance": (lambda d: d["errors"][0].update(worst=0.1), "and no case failed"),
    "no errors at all": (lambda d: d["errors"].clear(), "no error of it is there"),
    "a part of the kit": (lambda d: d["header"].update(level="L3"), "only a part of the kit"),
    "some cases alone": (lambda d: d.update(partial=True), "only a part of the kit"),
    "a dtype is left out": (lambda d: d["capabilities"]["dtypes"].append("float16"), "not every declared dtype ran"),
    "no version of torch": (lambda d: d["header"].pop("torch"), "lacks 'torch'"),
    "other contracts": (lambda d: d["capabilities"].update(contracts="1.0"), "contracts 1.0"),
    "an expected failure without a link": (
        lambda d: at(d, "L3/model/gpt2").update(status="xfail", text="known"), "without a reason or a link"),
    "an undeclared case passes": (lambda d: d["capabilities"].update(max_tp=1), "does not declare, and ended as pass"),
    "another seed": (lambda d: at(d, "L3/model/gpt2").update(
        command=at(d, "L3/model/gpt2")["command"].replace("--seed 0", "--seed 7")), "another command"),
}


def test_an_honest_report_is_complete(tmp_path: Path) -> None:
    assert found(honest(), tmp_path) == []
    widened = honest()
    widened["header"]["widened tolerances"] = "linear:float32=0.5"
    widened["errors"][0]["tolerance"] = 0.5
    assert found(widened, tmp_path) == []


@pytest.mark.parametrize("name", DOCTORED)
def test_a_doctored_report_is_not(name: str, tmp_path: Path) -> None:
    edit, said = DOCTORED[name]
    data = honest()
    edit(data)
    wrong = found(data, tmp_path)
    assert any(said in line for line in wrong), wrong


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"verdict": 1}', "[" * 9000, "\x00"])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match="report"):
        verify(str(tmp_path / "report.json"))


def test_a_list_of_another_version_is_named(tmp_path: Path) -> None:
    data = honest()
    data["header"]["kit"] = "0.1"
    with pytest.raises(ConfigError, match="must-pass list"):
        found(data, tmp_path)


def test_the_list_is_that_of_the_cases() -> None:
    """When cases have changed: a new KIT_VERSION, then `python -m hal.conformance.must_pass`."""
    assert must_pass.read(must_pass.KIT_VERSION) == must_pass.current()
    assert not {text.partition(":")[0] for text in must_pass.UNWRITTEN} & must_pass.current()["cases"].keys()


def test_reports_are_compared() -> None:
    before, after = honest(), honest()
    assert diff(before, after)[:-3] == []
    after["header"]["torch"] = "2"
    at(after, "L2/attention/window").update(status="fail", text="got 1, expected 2\nmore")
    after["results"].remove(at(after, "L3/model/gpt2"))
    after["errors"][0]["worst"] *= 3
    lines = diff(before, after)
    assert lines[:3] == ["torch: 1 -> 2", "L2/attention/window (float32): pass -> fail: got 1, expected 2",
                         "L3/model/gpt2 (float32): pass -> absent"]
    assert lines[3].startswith("worst error of linear in float32")
    rows = {row[0]: row[1:] for row in matrix(after)}
    assert rows["L2/attention"][0] == "6/7" and rows["L5/layout/tp2"] == ["1/1", "1/1"]
    assert rows["L5/layout/pp2"] == ["-", "-"] and rows["feature"] == list(DTYPES)
    shown = page([before, copy.deepcopy(after), honest()])
    assert shown.count("<th colspan='2'>vendor:backend</th>") == 3 and "class='bad'>6/7" in shown
    assert "<th>torch</th><td colspan='2'>1</td><td colspan='2'>2</td><td colspan='2'>1</td>" in shown
    assert "All runs have: " in shown and "<h2>Failures of vendor:backend (1)</h2>" in shown
    assert "<span>L5 distributed</span>" in shown and "<code>layout/<wbr>tp2_<wbr>pp2</code>" in shown


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    bad = honest()
    bad["verdict"] = "Conformant L9"
    for path, data in zip(paths, (honest(), bad), strict=True):
        Path(path).write_text(json.dumps(data))
    assert main(["conformance", "--verify", paths[0]]) == 0 and "complete and consistent" in capsys.readouterr().out
    assert main(["conformance", "--verify", paths[1]]) == 1 and "may not be relied on" in capsys.readouterr().out
    assert main(["conformance", "--diff", *paths, "--report", str(tmp_path)]) == 0
    assert "after:  Conformant L9" in capsys.readouterr().out
    assert (tmp_path / "side-by-side.html").read_text().startswith("<!doctype html>")
