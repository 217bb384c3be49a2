"""Each broken backend is caught, at its level and in its area; what is not broken passes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # ranks find `mutants` by sys.path

import mutants

import hal
from hal.conformance.run import Options, run

NAMES = sorted(mutants.MUTANTS)
SEED = int(os.environ.get("MUTANTS_SEED", "0"))  # any seed must do
RECORDING = Path(hal.__file__).parent / "assets" / "golden" / "cpu-float32-greedy.safetensors"


def failures(name: str, cases: tuple[str, ...], level: int = 6, examples: int = 25) -> list[str]:
    report = run(Options(f"mutants:device_{name}", level=level, cases=cases, shapes=str(RECORDING), examples=examples,
                         seed=SEED))
    return [r.case.name for r in report.failed]


def area(name: str) -> str:
    return mutants.MUTANTS[name]._expected


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mutant_is_caught_in_its_area(name: str) -> None:
    assert failures(name, (f"{area(name)}/{mutants.MUTANTS[name]._cases}",)), f"nothing of {area(name)} fails"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mutant_is_caught_at_its_level(name: str) -> None:
    """No level below the expected one complains."""
    level = int(area(name)[1])
    found = failures(name, ("*",), level=min(level, 5) - 1, examples=5) if level else []
    assert not found, f"{area(name)} was expected"


@pytest.mark.slow
@pytest.mark.parametrize(("device", "seed"), [("cpu", SEED + 1), ("mutants:control", SEED + 2)])
def test_a_backend_without_a_fault_passes(device: str, seed: int) -> None:
    assert not run(Options(device, level=4, seed=seed)).failed


def test_there_are_enough_mutants() -> None:
    """And each case that came after the first version of the kit kills two of them."""
    assert len(NAMES) >= 100
    newer = ("L3/batch/*", "L3/model/no_worse*", "L3/cache/contents", "L4/shapes/full_chunks",
             "L4/shapes/long_contexts", "L4/shapes/those*", "L5/layout/tp2_the_same*",
             "L1/embedding/*", "L3/embedding/*", "L5/embedding/*")
    aimed = [f"{area(name)}/{mutants.MUTANTS[name]._cases}" for name in NAMES]
    assert {case: aimed.count(case) for case in newer if aimed.count(case) < 2} == {}


@pytest.mark.slow
def test_a_program_cache_that_earlier_cases_filled_hides_nothing() -> None:
    """The case that looks at the sessions of all cases before it finds a step that compiles. Once the cache of the
    process is full, the case with a process of its own finds it."""
    options = Options("mutants:device_compiles_behind_a_warm_cache",
                      cases=("L4/shapes/every_batch_size", "L4/warm-up/no*"))
    mutants._PROGRAMS.clear()
    alone = "L4/warm-up/nothing_compiles_afterwards"
    assert {r.case.name for r in run(options).failed} == {alone, "L4/warm-up/no_case_has_compiled"}
    assert {r.case.name for r in run(options).failed} == {alone}
