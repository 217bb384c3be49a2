"""A message of k decode steps, and a round that verifies k drafts, are one message of the control plane."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch_case import launch
from messages_case import MOST, ROUNDS, counted


def check(mode: str, found: list[list[int]], *, sends: bool = True) -> None:
    """See `counted`. sends: this rank tells other ranks of its steps."""
    assert len(found) == MOST
    for k, (rounds, steps, messages) in enumerate(found, 1):
        assert (rounds, steps) == (ROUNDS, 1 + ROUNDS) if mode == "steps" else rounds > 0, (mode, k)
        assert messages == (steps if sends else 0), (mode, k)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["steps", "drafts"])
def test_one_process_sends_none(mode: str) -> None:
    check(mode, counted(mode), sends=False)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "wire", "plane"), [
    *(("steps", wire, plane) for wire in ("model-input", "request") for plane in ("shm", "gloo", "collectives")),
    ("drafts", "model-input", "shm"), ("drafts", "request", "gloo"), ("drafts", "model-input", "collectives")])
def test_a_round_is_one_message(mode: str, wire: str, plane: str) -> None:
    check(mode, counted(mode, tp=2, wire=wire, control_plane=plane))


@pytest.mark.slow
def test_ranks_that_torchrun_starts_hear_of_the_tokens_alone_once_a_round(tmp_path: Path) -> None:
    cases = "steps shm", "steps gloo", "steps collectives", "drafts shm"
    done = launch(2, Path(__file__).with_name("messages_case.py"), str(tmp_path), *cases)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        for mode, found in json.loads((tmp_path / str(rank)).read_text()):
            check(mode, found, sends=rank == 0)
