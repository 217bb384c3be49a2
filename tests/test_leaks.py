"""The check after each test (conftest.py) sees what a test leaves behind, and puts it right for the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import leaks
import pytest
import torch

from hal.guard import Phase, phase


def test_each_kind_of_leak_is_named_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_GRACE", 0.1)
    monkeypatch.setenv("HAL_KEPT", "1")
    before, children = leaks.state(), leaks.children()
    assert leaks.changes(before, children) == []
    phase(Phase.EXECUTE, 3).__enter__()
    os.environ["HAL_NEW"] = "2"
    del os.environ["HAL_KEPT"]
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(before["torch's threads"] + 1)
    torch.set_grad_enabled(not before["torch's grad mode"])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        found = leaks.changes(before, children)
        assert process.stdin is not None
        process.stdin.close()
    leaks.restore(before)
    named = ["the guard's phase", "HAL_* of the environment", "torch's default dtype", "torch's threads",
             "torch's grad mode", f"process {process.pid}"]
    assert [line.partition(":")[0] for line in found] == named
    assert leaks.changes(before, children) == [] and os.environ["HAL_KEPT"] == "1"


def test_a_process_that_only_just_begins_is_a_leak_and_one_that_has_ended_is_none() -> None:
    """The command of a process is empty while it begins, for longer on a loaded machine, and after its end."""
    for _ in range(100):
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
            pid = str(process.pid)
            assert leaks.children()[pid]
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays, to be waited for
            assert not leaks.children()[pid]
