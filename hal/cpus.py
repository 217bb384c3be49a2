"""The processors that this process may use: those of its affinity, within the quotas of its control groups."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """At least 1. A quota (control groups of version 1 or 2) of 2.5 processors counts as 2: a third thread would be
    stopped for most of its time, and the others would wait for it."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = cgroup
        elif "cpu" in controllers.split(","):
            base = next((cgroup / name for name in (controllers, "cpu") if (cgroup / name).is_dir()), cgroup / "cpu")
        else:
            continue
        inner = base / path.strip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base):
                quota, period = _text(folder / "cpu.max").split() or (
                    _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip())
                if quota.isdigit() and period.isdigit() and int(period):
                    found = min(found, int(quota) // int(period))
    return max(found, 1)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
