"""The number of processors follows from the affinity and from the quotas of both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hal import cpus
from workers.executors import processes


@pytest.mark.parametrize(("membership", "files", "expected"), [
    ("0::/app/inner", {}, 8),
    ("0::/app/inner", {"app/inner/cpu.max": "max 100000"}, 8),
    ("0::/app/inner", {"app/inner/cpu.max": "400000 100000"}, 4),
    ("0::/app/inner", {"app/inner/cpu.max": "400000 100000", "app/cpu.max": "250000 100000"}, 2),
    ("0::/", {"cpu.max": "50000 100000"}, 1),
    ("5:cpu,cpuacct:/job", {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                            "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 3),
    ("5:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 8),
    ("4:memory:/job", {"memory/job/cpu.cfs_quota_us": "100000", "memory/job/cpu.cfs_period_us": "100000"}, 8)])
def test_quotas(membership: str, files: dict[str, str], expected: int, tmp_path: Path,
                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(membership + "\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpus.usable_cpus(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_ranks_share_what_the_quota_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(processes, "_siblings", str)
    monkeypatch.setattr(processes, "usable_cpus", lambda: 4)
    assert [processes.threads_per_rank(n) for n in (1, 2, 3, 8)] == [4, 2, 1, 1]
    assert processes.threads_of_driver(1) == 4 and processes.threads_of_driver(2) == 2
