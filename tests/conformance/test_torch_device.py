"""PyTorch's own tests of a device, tried with the fake device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_pytorchs_own_tests_run_on_the_fake_device(tmp_path: Path) -> None:
    """They find what the fake device does not simulate: a matrix product with a vector squeezes its result in place."""
    pytest.importorskip("expecttest", reason="PyTorch's harness needs it: pip install expecttest")
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "hal.conformance.torch_device"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "HAL_BACKEND": "fake", "PYTHONPATH": os.pathsep.join(sys.path)})
    failed = sorted(re.findall(r"^FAILED .*test_as_on_the_cpu_(\w+)", done.stdout, re.MULTILINE))
    assert failed == ["matmul_fake_bfloat16", "matmul_fake_float32"], done.stdout[-2000:] + done.stderr[-2000:]
    assert "an operation changes the shape of its argument" in done.stdout and "66 passed" in done.stdout
