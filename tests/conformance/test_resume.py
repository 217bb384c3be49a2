"""A verdict from several runs, and what an interrupted run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_verify import found, honest

from hal.conformance import report
from hal.conformance.resume import OVER_ALL, SHAPES
from hal.conformance.run import Options, run
from hal.errors import ConfigError

SOME = "L0/registration/*"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("report")
    some = run(Options("null", level=0, examples=2, cases=(SOME,)))
    assert some.partial and some.verdict.startswith("No verdict")
    report.write(some, folder)
    return report.read(str(folder / "report.json"))


def resumed(data: dict[str, Any], **options: Any) -> tuple[report.Report, set[str]]:
    ran = set[str]()
    made = run(Options("null", **{"level": 0, "examples": 2, "resume": data, **options}),
               lambda _, result: None if result is None else ran.add(result.case.name))
    return made, ran


def test_only_the_other_cases_run_and_the_verdict_stands(earlier: dict[str, Any]) -> None:
    before = {r["case"] for r in earlier["results"]}
    made, ran = resumed(earlier)
    assert ran and not ran & before and {r.case.name for r in made.results} == ran | before
    assert made.verdict == "Conformant L0 (float32, bfloat16, float16); from 2 runs"
    again = json.loads(report.as_json(made))
    assert [run["seed"] for run in again["runs"]] == ["0", "0"] and report.loaded(again).verdict == made.verdict
    assert resumed(again)[1] == set()


def test_what_failed_runs_again(earlier: dict[str, Any]) -> None:
    broken = json.loads(json.dumps(earlier))
    broken["results"][0].update(status="fail")
    made, ran = resumed(broken, cases=(SOME,))
    assert ran == {broken["results"][0]["case"]} and not made.failed and made.partial


@pytest.mark.parametrize(("name", "other"), [
    ("seed", "3"), ("examples", "9"), ("torch", "1.0"), ("kit", "0.1"), ("code", "0" * 16), ("backend", "cpu")])
def test_the_report_of_another_run_is_refused(name: str, other: str, earlier: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{name}: {other} then"):
        resumed({**earlier, "header": earlier["header"] | {name: other}})


def test_what_steps_compiled_in_an_earlier_run_still_counts(earlier: dict[str, Any]) -> None:
    made, ran = resumed({**earlier, "late": {"L3/model/x": ["1 in execute of step 2"]}}, level=4, cases=(OVER_ALL,))
    assert ran == {OVER_ALL} and [r.case.name for r in made.failed] == [OVER_ALL]


def test_a_case_with_a_recording_of_its_own_runs_again(earlier: dict[str, Any]) -> None:
    passed = {**earlier["results"][0], "case": SHAPES, "level": 4, "area": "shapes", "dtype": "any"}
    data = {**earlier, "results": [*earlier["results"], passed]}
    assert resumed(data, level=4, cases=(SHAPES,))[1] == set()
    assert resumed(data, level=4, cases=(SHAPES,), shapes="no such file")[1] == {SHAPES}


def test_the_verifier_compares_the_runs(tmp_path: Path) -> None:
    data = honest()
    data["runs"] = [data["header"], data["header"] | {"level": "L3"}]
    data["verdict"] += "; from 2 runs"
    assert found(data, tmp_path) == []
    data["runs"][0] = data["header"] | {"seed": "1"}
    assert found(data, tmp_path) == ["run 1 had another seed than the header says: 1"]


@pytest.mark.slow
def test_an_interrupted_run_says_how_far_it_came_and_can_be_resumed(tmp_path: Path) -> None:
    # So many examples that the run does not end before its signal, however late this process sends it.
    words = ["conformance", "--backend", "null", "--level", "1", "--examples", "20000", "--report", str(tmp_path)]
    child = forked.Popen([sys.executable, "-m", "hal", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                         text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert child.stderr is not None
    lines = [child.stderr.readline() for _ in range(3)]
    child.send_signal(signal.SIGTERM)
    told = child.stderr.read()
    assert child.wait(60) == 128 + signal.SIGTERM
    assert all(line.startswith("pass ") and " s  L0/" in line for line in lines)
    assert "L0 registration and capabilities" in told
    assert "\ninterrupted in L" in told or "\ninterrupted between two cases" in told
    assert len(report.read(str(tmp_path / "report.json"))["results"]) >= 3
