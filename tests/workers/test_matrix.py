"""Every topology gives the tokens of one process, with each wire policy and each control plane. A rank that fails is
named where torchrun starts the ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launch_case import alone, generate, generated_by_launched, launch

from hal.engine.llm import LLM
from hal.errors import ConfigError

TOPOLOGIES = [(2, 1), (1, 2), (2, 2)]
PLANES = ["shm", "gloo", "collectives"]  # and "ray": test_ray.py


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["model-input", "request", "none"])
def test_one_rank_runs_with_every_wire_policy(wire: str) -> None:
    assert generate(wire=wire) == alone()


# Each two of topology, wire policy and control plane occur together; not all three, since each case starts processes.
PAIRS = [(tp, pp, ("model-input", "request")[(i + j) % 2], plane)
         for i, (tp, pp) in enumerate(TOPOLOGIES) for j, plane in enumerate(PLANES)]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "wire", "plane"), PAIRS)
def test_ranks_that_the_driver_starts(tp: int, pp: int, wire: str, plane: str) -> None:
    assert generate(tp=tp, pp=pp, wire=wire, control_plane=plane) == alone()


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), TOPOLOGIES)
def test_ranks_that_torchrun_starts(tp: int, pp: int, tmp_path: Path) -> None:
    assert generated_by_launched(tmp_path, *PLANES, tp=tp, pp=pp) == [dict.fromkeys(PLANES, alone())] * (tp * pp)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "expected"), [
    ("execute-bug 1 3", "WorkerError: rank 1 failed in step 3 .*'execute-bug'"),
    ("load-capacity 1 0", "CapacityError: (rank 1: )?weights do not fit"),
    ("warmup-bug 1 0", "WorkerError: rank 1 failed while it started: 'warmup-bug'"),
    ("differ", "WorkerError: rank [01] failed in step 1 .*differ in input digest"),
    ("differ over gloo", "WorkerError: rank 1 failed in step 1 .*went different ways")])
def test_a_rank_that_fails_is_named_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str,
                                           expected: str) -> None:
    monkeypatch.setenv("TEST_FAULT", "none 0 0" if "differ" in fault else fault)
    monkeypatch.setenv("HAL_STRICT", str(int("gloo" not in fault)))  # else found out sooner
    launch(2, Path(__file__).with_name("launch_fault.py"), str(tmp_path), fault)
    for rank in range(2):
        assert re.match(expected, (tmp_path / str(rank)).read_text()), (rank, (tmp_path / str(rank)).read_text())


def test_no_launcher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no launcher started this one.*RANK.*torchrun --nproc-per-node 2"):
        LLM(tp=2, wire="none")
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"(?s)another number of ranks.*WORLD_SIZE=3.*tp \* pp = 2"):
        LLM(tp=2, wire="none")
