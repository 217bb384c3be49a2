"""A program of vLLM ends with status 1 after a reported failure; other programs keep their own status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, subprocess, sys
atexit.register(print, "an earlier handler")
from hal_vllm.exit_status import watch_for_failure
watch_for_failure()
watch_for_failure()  # vLLM copies its configuration, and checks the copy
REPORT = '''
from hal_vllm.exit_status import report_failure
report_failure(ValueError("it broke"))
report_failure(OSError("which broke this"))
'''
if "fails" in sys.argv:
    subprocess.run([sys.executable, "-c", REPORT], check=True)
"""


@pytest.mark.parametrize(("name", "argument", "status"), [("vllm", "fails", 1), ("vllm", "", 0), ("other", "fails", 0)])
def test_exit_status(tmp_path: Path, name: str, argument: str, status: int) -> None:
    path = tmp_path / name
    path.write_text(PROGRAM)
    environment = {key: value for key, value in os.environ.items() if key != "HAL_VLLM_FAILURE"}
    done = subprocess.run([sys.executable, str(path), argument], capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    assert done.stdout.count("an earlier handler") == 1
    assert ("exit status 1, since the engine has failed: ValueError: it broke" in done.stderr) == (status == 1)
