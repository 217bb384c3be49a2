"""A process that has an engine forks: the child is told that the engine is not its own, and the parent goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import forked
import pytest

FORKING = Path(__file__).with_name("forking.py")


OUTCOMES = {"exit": [], "collect": [], "use": ["told True"] * 4, "ahead": ["told True"] * 4, "own": ["True"],
            "restart": ["True"]}


@pytest.mark.slow
@pytest.mark.parametrize(("plane", "tp", "actions"), [
    ("shm", 2, ["exit", "collect", "use", "restart", "ahead"]), ("gloo", 2, ["exit", "collect", "own", "ahead"]),
    ("auto", 1, ["exit", "use"])], ids=["shm", "gloo", "one-rank"])
def test_forked_children_leave_the_engine_to_the_parent(plane: str, tp: int, actions: list[str]) -> None:
    """One engine forks a child for each action. The parent generates the same tokens after every child has ended.

    A child that ends (by leaving the `with` block, by garbage collection, by exit handlers) does not end the parent's
    ranks, and it does end, although it has none of the threads of its process groups. A child that uses the engine gets
    an error that names the parent. A child may make an engine of its own, or restart the one that it inherited.
    """
    done = forked.run([sys.executable, str(FORKING), plane, str(tp), *actions], capture_output=True, text=True,
                      timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    expected = [line for action in actions for line in (action, *OUTCOMES[action], "status 0 parent True")]
    assert done.stdout.splitlines() == [*expected, "left []"]
