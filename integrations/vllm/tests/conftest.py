"""The environment of the tests, and the reason to skip them where vLLM cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `served`
os.environ |= {"HAL_DEVICE": "cpu", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
               "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
_WITHOUT_VLLM = ("test_surface.py", "test_exit_status.py")  # files that import nothing of vLLM


@cache
def _unusable() -> str | None:
    """The reason why vLLM cannot be imported here. It is found out in another process, since a compiled module that was
    built for another processor ends its process."""
    if "avx512f" in Path("/proc/cpuinfo").read_text():
        return None
    found = subprocess.run([sys.executable, "-c", "from vllm import LLM"], capture_output=True, text=True)
    return f"vLLM cannot be imported: exit status {found.returncode}" if found.returncode else None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    name = collection_path.name
    if name.startswith("test_") and name not in _WITHOUT_VLLM and _unusable():
        return True
    return None


def pytest_report_header() -> str:
    return f"vLLM's engine: {_unusable() or 'usable'}; HAL_STRICT={os.environ.get('HAL_STRICT', 'not set')}"


@pytest.fixture(scope="session")
def cpu() -> Iterator[Any]:
    """One engine for the tests that need nothing special."""
    from served import serving

    with serving() as llm:
        yield llm


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts vLLM's API servers."""
    from servers import Servers

    started = Servers(tmp_path_factory.mktemp("servers"))
    yield started
    started.close()
