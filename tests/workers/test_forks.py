"""A process that has an engine forks: the child is told that the engine is not its own, and the parent goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FORKING = Path(__file__).with_name("forking.py")


def forked(action: str, plane: str, tp: int) -> list[str]:
    done = subprocess.run([sys.executable, str(FORKING), action, plane, str(tp)], capture_output=True, text=True,
                          timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("action", "plane", "tp"), [
    ("exit", "shm", 2), ("exit", "gloo", 2), ("collect", "shm", 2), ("collect", "gloo", 2), ("exit", "auto", 1)])
def test_a_forked_child_that_ends_does_not_end_the_parents_ranks(action: str, plane: str, tp: int) -> None:
    """By leaving the `with` block, by garbage collection and by exit handlers; and it does end, though it has none of
    the threads of its process groups."""
    assert forked(action, plane, tp) == ["status 0 parent True", "left []"]


@pytest.mark.slow
@pytest.mark.parametrize(("action", "plane", "tp"), [
    ("use", "shm", 2), ("ahead", "shm", 2), ("ahead", "gloo", 2), ("use", "auto", 1)])
def test_a_forked_child_that_uses_the_engine_gets_an_error_with_its_owner(action: str, plane: str, tp: int) -> None:
    assert forked(action, plane, tp) == ["told True"] * 4 + ["status 0 parent True", "left []"]


@pytest.mark.slow
@pytest.mark.parametrize(("action", "plane"), [("own", "gloo"), ("restart", "shm")])
def test_a_child_may_make_an_engine_of_its_own(action: str, plane: str) -> None:
    assert forked(action, plane, 2) == ["True", "status 0 parent True", "left []"]
