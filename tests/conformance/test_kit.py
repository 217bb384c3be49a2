"""The kit itself: how results become a verdict and reports, and that what it prints can be relied on."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import forked
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `mutants`

from hal.cli import main
from hal.conformance import html, report
from hal.conformance.case import LEVELS, Case, Mismatch, NotApplicable, all_cases
from hal.conformance.context import Context
from hal.conformance.run import Options, Report, Result, outcome, read_expected, run
from hal.conformance.speed import read_thresholds
from hal.conformance.tasks import HELD_OUT, read_problems
from hal.errors import BackendError, ConfigError, GuardError
from hal.testing.null import NullBackend
from hal.testing.tolerance import TOLERANCES, Tolerances

EXAMPLE = Path(__file__).parents[2] / "examples" / "numpy-backend"


def result(level: int, status: str, dtype: str = "float32", name: str = "case", text: str = "") -> Result:
    case = Case(f"L{level}/area/{name}", level, "area", lambda ctx: None, (), False, "what it shows")
    return Result(case, dtype, status, text, 0.1, "hal conformance ...")  # type: ignore[arg-type]


def made(*results: Result, dtypes: tuple[str, ...] = ("float32",), partial: bool = False) -> Report:
    return Report({"backend": "x"}, dtypes, list(results), partial=partial)


@pytest.mark.parametrize(("statuses", "verdict"), [
    (["pass"] * 7, "Conformant L6 (float32)"),
    (["pass", "pass", "fail", "pass"], "Conformant L1 (float32)"),
    (["pass", "error"], "Conformant L0 (float32)"),
    (["fail"], "Not conformant (float32)"),
    (["pass", "pass", "n/a", "pass"], "Conformant L3 (float32); n/a: L2 1 of 1"),
    (["pass", "n/a"], "Conformant L0 (float32)"),
    (["n/a", "n/a"], "Not conformant (float32)"),
    (["pass", "xfail"], "Conformant L0 (float32); 1 expected failures"),
])
def test_verdict(statuses: list[str], verdict: str) -> None:
    assert made(*(result(level, s) for level, s in enumerate(statuses))).verdict == verdict


def test_verdict_by_dtype() -> None:
    both = made(result(0, "pass", "any"), result(1, "pass"), result(1, "fail", "bfloat16"),
                dtypes=("float32", "bfloat16"))
    assert both.verdict == "Conformant L1 (float32), Conformant L0 (bfloat16)"
    assert made(result(0, "pass"), partial=True).verdict.startswith("No verdict")


def test_denominators_leave_out_what_is_not_applicable() -> None:
    some = made(*(result(2, s, name=str(i)) for i, s in enumerate(["pass", "pass", "fail", "n/a", "xfail", "error"])))
    assert report.cell(some, 2, "float32") == "2/5 fail 1 xfail 1 n/a 1 error 1"
    assert report.cell(made(result(2, "n/a")), 2, "float32") == "n/a 1"


@pytest.mark.parametrize(("error", "status"), [
    (Mismatch("x"), "fail"), (NotApplicable("x"), "n/a"), (KeyError("x"), "error"), (BackendError("x"), "fail"),
    (GuardError("x", phase="prepare", operation="send", site="a:1"), "fail"), (None, "pass")])
def test_how_a_case_ends(error: Exception | None, status: str, tmp_path: Path) -> None:
    from hal.contracts import backend as backends

    def check(ctx: Context) -> None:
        if error is not None:
            raise error

    case = Case("L0/area/x", 0, "area", check, (), True, "")
    assert outcome(case, Context(backends.load("null"), "null", "float32", 0, scratch=tmp_path))[0] == status


def test_a_declared_capability_is_demanded_and_another_is_not_applicable(tmp_path: Path) -> None:
    from hal.contracts import backend as backends

    case = Case("L0/area/x", 0, "area", lambda ctx: None, ("checkpoints", "swap"), True, "")
    assert case.missing(backends.load("null")) == "the backend does not declare: checkpoints"
    assert case.missing(backends.load("cpu")) is None


def test_expected_failures_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "xfail.json"
    entry = {"case": "L2/norm/*", "reason": "eps is fixed in hardware", "link": "https://example.org/1"}
    path.write_text(json.dumps({"xfail": [entry]}))
    options = Options("mutants:device_wrong_epsilon", cases=("L2/norm/*",), expected_file=str(path))
    by_name = {r.case.name: r for r in run(options).results}
    assert by_name["L2/norm/rms_norm"].status == "xfail" and entry["reason"] in by_name["L2/norm/rms_norm"].text
    assert by_name["L2/norm/rms_norm"].link == entry["link"]
    passing = by_name["L2/norm/layer_norm"]
    assert passing.status == "fail" and "was expected to fail" in passing.text
    assert "--xfail" in passing.command
    for text in ("no json", '{"xfail": [{"case": "*"}]}', "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="expected failures"):
            read_expected(str(path))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_expected_failures_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "xfail.toml"
    path.write_text('[[xfail]]\ncase = "L5/*"\ndtype = "bfloat16"\nreason = "r"\nlink = "l"\n')
    only, = read_expected(str(path))
    assert only.covers("L5/layout/tp2", "bfloat16") and not only.covers("L5/layout/tp2", "float32")


def test_tolerances_are_widened_never_narrowed() -> None:
    wide = Tolerances.parse(["attention:bfloat16=0.05"])
    assert wide("attention", "bfloat16") == 0.05 and wide("linear", "bfloat16") == TOLERANCES["linear"]["bfloat16"]
    assert "--tolerance attention:bfloat16=0.05" in Options("x", tolerances=wide).command("c", "bfloat16")
    for text in ("attention:bfloat16=0.001", "attention=1", "nothing:float32=1", "norm:float32=x"):
        with pytest.raises(ConfigError):
            Tolerances.parse([text])


def test_widening_lets_a_case_pass_and_is_printed() -> None:
    options = {"device": "mutants:device_softmax_in_bfloat16", "cases": ("L2/attention/decode",)}
    assert run(Options(**options)).failed  # type: ignore[arg-type]
    wide = run(Options(**options, tolerances=Tolerances.parse(["attention:float32=0.02"])))  # type: ignore[arg-type]
    assert not wide.failed and wide.header["widened tolerances"] == "attention:float32=0.02"


@pytest.mark.slow
def test_a_failure_prints_the_command_that_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    broken = "mutants:device_drops_the_bias"
    first = run(Options(broken, seed=4, cases=("L2/*",))).failed[0]
    words = shlex.split(first.command)
    assert words[:2] == ["hal", "conformance"] and main(words[1:]) == 1
    assert first.text in capsys.readouterr().out


def test_all_forms_of_a_report_agree(tmp_path: Path) -> None:
    some = made(result(0, "pass"), result(1, "fail", text="<b>\x07 & wrong"), result(2, "n/a", text="no part"))
    some.errors["linear", "float32"] = [np.array([0.0, 1e-7, 3e-6, 2.0])]
    report.write(some, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["verdict"] == some.verdict == "Conformant L0 (float32)"
    assert data["errors"][0]["worst"] == 2.0 and [r["status"] for r in data["results"]] == ["pass", "fail", "n/a"]
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "&lt;b&gt;" in page and "<b>\x07" not in page and "http" not in page.replace("http:", "")
    assert "| L1 input contracts | 0/1 fail 1 |" in (tmp_path / "report.md").read_text()
    assert "FAIL L1/area/case" in report.terminal(some) and report.terminal(some).endswith(some.verdict)


def test_histogram_shows_every_element() -> None:
    drawn = html.histogram("x", np.array([0.0, 1e-20, 1e-5, 1e9]), 1e-4)
    assert ElementTree.fromstring(drawn) is not None and drawn.count("fill='#4a7fc1'") == 3 and "4 elements" in drawn


def test_every_case_says_what_it_shows() -> None:
    cases = all_cases()
    assert {c.level for c in cases} == set(range(len(LEVELS)))
    assert not any(" " in c.name for c in cases)  # names are words of a command
    assert all(c.doc.endswith(".") for c in cases), [c.name for c in cases if not c.doc.endswith(".")]


@pytest.mark.slow
def test_a_backend_without_checkpoints_is_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """A backend without arithmetic for checkpoints gets no verdict for operations, and a real one for the rest."""
    assert main(["conformance", "--backend", "null", "--level", "3", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nConformant L3 \(float32\); n/a: .*\bL2 (\d+) of \1\b", out), out
    assert "kit: " in out and "seed: 0" in out


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--backend", "pigeon"], ["--backend", "cpu", "--case", "L9/*"],
                  ["--backend", "cpu", "--dtype", "float64"]):
        assert main(["conformance", *words]) == 1
        assert "hal: error:" in capsys.readouterr().err
    assert main(["conformance"]) == 2


@pytest.mark.slow
def test_the_pytest_plugin_runs_the_same_cases(tmp_path: Path) -> None:
    words = ["-q", "-p", "hal.conformance.plugin", "--pyargs", "hal.conformance.suite", "-k", "norm or registration",
             "--hal-level", "2", "--hal-backend", "mutants:device_wrong_epsilon"]
    done = forked.run([sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True,
                      env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}, timeout=120)
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "to repeat: hal conformance --backend mutants:device_wrong_epsilon --case L2/norm/rms_norm" in done.stdout


def test_the_example_is_small_and_patches_nothing() -> None:
    files = list((EXAMPLE / "hal_numpy").glob("*.py"))
    text = "\n".join(f.read_text() for f in files)
    assert len(files) == 3 and len(text.splitlines()) <= 300
    assert not any(word in text for word in ("setattr", "monkeypatch", "sys.modules", "torch.nn", "F."))


@pytest.mark.slow
def test_the_example_conforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other cases of L5 are about workers alone: wire policies, control planes and failures. The kit runs them for
    the fake device."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    backend = "hal_numpy:backend"
    assert run(Options(backend, level=4, examples=5)).verdict.startswith("Conformant L4 (float32)")
    several = run(Options(backend, cases=("L5/layout/tp2", "L5/layout/pp2", "L5/layout/tp4_shared_heads", "L6/*")))
    assert not several.failed and sum(result.status == "pass" for result in several.results) >= 7


def test_reasons_are_grouped_and_seconds_are_shown_by_level() -> None:
    absent = ("a", "no x"), ("b", "y"), ("c", "no x")
    some = made(result(0, "pass"), result(1, "pass"), result(2, "pass", name="d"),
                *(result(2, "n/a", name=name, text=text) for name, text in absent))
    assert some.verdict == "Conformant L2 (float32); n/a: L2 3 of 4"
    shown = report.terminal(some)
    assert "L2/area/a, L2/area/c: no x\n" in shown and shown.splitlines()[0].split() == ["level", "float32", "seconds"]
    assert shown.splitlines()[3].split()[-1] == "0.4"
    assert "- L2/area/a, L2/area/c: no x" in report.markdown(some)


class OneDevice(NullBackend):
    """A machine that has one of this device."""

    name = "test_kit:one_device"

    def device(self, local_rank: int) -> torch.device:
        if local_rank:
            raise BackendError("there are more ranks than devices", got=f"rank {local_rank}", hint="add one")
        return torch.device("cpu")


one_device = OneDevice()


@pytest.mark.slow
def test_too_few_devices_are_no_failure() -> None:
    found = run(Options("test_kit:one_device", cases=("L5/layout/pp2_requests", "L5/failure/killed_rank_tp2"))).results
    assert [r.status for r in found] == ["n/a", "n/a"]
    assert all(r.text.startswith("needs 2 devices: ") and r.text.endswith(
        "hal conformance --backend test_kit:one_device --level 5") for r in found), found


@pytest.mark.slow
def test_speed_is_recorded_and_is_no_part_of_the_verdict(tmp_path: Path) -> None:
    found = run(Options("null", cases=("L0/device/*",), dtypes=("float32",), speed={"decode of 8 sequences": 1e9}))
    by_name = {s.name: s for s in found.speed}
    assert {"start-up", "decode of 1 sequences", "prefill of 8 x 256 tokens",
            "step of a tiny model on 2 ranks"} <= by_name.keys()
    assert by_name["decode of 8 sequences"].text.endswith("; declared 1e+09, and MISSED") and not found.failed
    report.write(found, tmp_path)
    assert "class='xfail'>" in (tmp_path / "report.html").read_text()
    assert "## Speed" in (tmp_path / "report.md").read_text()
    assert report.read(str(tmp_path / "report.json"))["speed"][0]["name"] == "copying 1 GB"


def test_thresholds_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for text in ("", "[1]", '{"decode": "fast"}'):
        (tmp_path / "least.json").write_text(text)
        with pytest.raises(ConfigError, match="speed thresholds"):
            read_thresholds(str(tmp_path / "least.json"))


@pytest.mark.slow
def test_tasks_are_counted_by_dtype_format_and_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = HELD_OUT.read_text().splitlines()[:20]
    (tmp_path / "tasks.jsonl").write_text("\n".join([*problems, '{"prompt": "1+1=", "answer": "3"}']))
    words = ["conformance", "--backend", "cpu", "--case", "L0/device/*", "--dtype", "float32"]
    assert main([*words, "--report", str(tmp_path), "--tasks", str(tmp_path / "tasks.jsonl")]) == 0
    shown = capsys.readouterr().out
    for how in ("as stored, one rank", "quantize=int8", "kv_dtype=fp8", "tp=2", "pp=2"):
        assert f"float32, {how}: 20 of 21 right" in shown
    assert "<td>20 of 21</td>" in (tmp_path / "report.html").read_text()
    assert report.read(str(tmp_path / "report.json"))["tasks"][0]["right"] == 20


def test_tasks_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for text in ("", "[1]", '{"prompt": "1+1="}', '{"prompt": "1+1=", "answer": 2}', '{"prompt": "", "answer": "2"}'):
        (tmp_path / "tasks.jsonl").write_text(text)
        with pytest.raises(ConfigError, match="file of tasks"):
            read_problems(str(tmp_path / "tasks.jsonl"))
