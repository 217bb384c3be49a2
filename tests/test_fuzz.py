"""The fuzzer of messages and recordings with few mutations; `make fuzz` runs all of them, with a seed of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_mutated_messages_and_recordings_end_in_named_errors() -> None:
    """In a process of its own, whose memory is limited."""
    script = Path(__file__).parent / "fuzz.py"
    counts = ["--wire", "3000", "--recordings", "100", "--seed", "0"]
    done = subprocess.run([sys.executable, str(script), *counts], text=True,
                          capture_output=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "seed 0" in done.stdout and "3000 messages" in done.stdout and "100 recordings" in done.stdout
