"""The processors that this process may use: those of its affinity, within the quotas of its control groups."""

from __future__ import annotations

import os
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cpus(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """At least 1. A quota (control groups of version 1 or 2) of 2.5 processors counts as 2: a third thread would be
    stopped for most of its time, and the others would wait for it."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, _ in control_groups("cpu", proc, cgroup):
        quota, period = text_of(folder / "cpu.max").split() or (
            text_of(folder / "cpu.cfs_quota_us").strip(), text_of(folder / "cpu.cfs_period_us").strip())
        if quota.isdigit() and period.isdigit() and int(period):
            found = min(found, int(quota) // int(period))
    return max(found, 1)


def control_groups(controller: str, proc: Path = PROC, cgroup: Path = CGROUP) -> list[tuple[Path, int]]:
    """The folder of each control group that limits this process by a controller, with the version of control groups (1
    or 2), from the innermost group to the root."""
    found = []
    for line in text_of(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, version = cgroup, 2
        elif controller in controllers.split(","):
            names = (cgroup / controllers, cgroup / controller)  # one folder may serve several controllers
            base, version = next((folder for folder in names if folder.is_dir()), names[-1]), 1
        else:
            continue
        inner = base / path.strip("/")
        found += [(folder, version) for folder in (inner, *inner.parents) if folder.is_relative_to(base)]
    return found


def text_of(path: Path) -> str:
    """The content of a file, or an empty text where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
