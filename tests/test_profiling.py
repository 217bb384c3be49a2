"""Spans: a step's are in a profiler's trace where they belong, on every rank; and off they are nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hal import profiling
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

STEP = "prepare", "execute", "sample", "fetch"
PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3]]
pytestmark = pytest.mark.torch_release


def spans(path: Path) -> list[tuple[str, float, float]]:
    """Name, begin and end of each in a Chrome trace, by time."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [(e["name"], float(e["ts"]), e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"]
    return sorted((span for span in found if not span[0].startswith("ProfilerStep")), key=lambda span: span[1])


def inside(inner: tuple[str, float, float], outer: tuple[str, float, float]) -> bool:
    return outer[1] <= inner[1] and inner[2] <= outer[2]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tp": 2}, {"pp": 2, "wire": "request"}], ids=str)
def test_a_trace_has_the_spans_of_each_step(tmp_path: Path, options: dict[str, Any]) -> None:
    with LLM(device="null", num_blocks=64, async_scheduling=False, **options) as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=3))
        before = llm.stats().steps
        with profiling.trace(str(tmp_path / "trace.json")):
            llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
        steps = llm.stats().steps - before
        llm.generate(PROMPTS, SamplingParams(max_tokens=3))
    found = spans(tmp_path / "trace.json")
    names = [n for n in STEP if n != "sample" or "pp" not in options] + ["broadcast"] * bool(options)
    assert steps >= 4 and Counter(name for name, *_ in found) == dict.fromkeys(names, steps)
    executes = [span for span in found if span[0] == "execute"]
    for span in found:
        assert [inside(span, e) for e in executes].count(True) == (span[0] in ("sample", "execute")), span
    if not options:
        assert [name for name, *_ in found] == list(STEP) * steps


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened (name) and closed (-name) from now on, of any thread."""
    seen: list[str] = []

    @contextlib.contextmanager
    def record(name: str) -> Iterator[None]:
        seen.append(name)
        yield
        seen.append(f"-{name}")

    monkeypatch.setattr(torch.profiler, "record_function", record)
    return seen


def test_spans_are_not_opened_when_profiling_is_off(opened: list[str]) -> None:
    with LLM(device="null", num_blocks=64) as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=3))
    assert opened == [] and profiling.span("prepare") is profiling.span("execute")


def test_a_span_is_a_range_of_the_devices_profiler_too(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_on", True)
    monkeypatch.setattr(profiling, "_marks", [])
    ranges: list[str] = []

    @contextlib.contextmanager
    def mark(name: str) -> Iterator[None]:
        ranges.append(name)
        try:
            yield
        finally:
            ranges.append("pop")

    for _ in range(2):  # as a backend does whenever it makes its device current
        profiling.mark_with(mark)
    with pytest.raises(KeyError), profiling.span("execute"):
        with profiling.span("sample"):
            ranges.append("...")
        raise KeyError
    assert ranges == ["execute", "sample", "...", "pop", "pop"] and opened[:3] == ["execute", "sample", "-sample"]


def test_an_error_in_a_trace_ends_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), profiling.trace(str(tmp_path / "trace.json")):
        raise KeyError
    assert not profiling._on and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("wire", "told"), [("model-input", ["receive", "execute"]),
                                            ("request", ["receive", "prepare", "execute"])])
def test_ranks_in_other_processes_inherit_the_switch(opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     wire: str, told: list[str]) -> None:
    monkeypatch.setattr(profiling, "_on", True)
    monkeypatch.setenv("HAL_PROFILE", "1")
    monkeypatch.setenv("TEST_SPANS", str(tmp_path / "spans"))
    with LLM(device="spans_backend:backend", num_blocks=64, tp=2, wire=wire, async_scheduling=False) as llm:
        opened.clear()
        llm.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))
        steps = llm.stats().steps
    theirs = (tmp_path / "spans").read_text().split()
    assert theirs[:len(told) * steps] == told * steps and theirs[len(told) * steps:] in ([], ["receive"])  # at the end
    own = {"prepare", "broadcast", "execute", "sample", "fetch"}
    assert Counter(name for name in opened if name[0] != "-") == dict.fromkeys(own, steps)


def test_the_environment_switches_it_on() -> None:
    code = "import sys; from hal.profiling import _on; sys.exit(2 * _on + ('torch' in sys.modules))"
    for value, expected in (("1", 2), ("0", 0), ("", 0)):
        assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "HAL_PROFILE": value},
                              check=False).returncode == expected
