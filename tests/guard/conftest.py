from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # guard_env and guard_cases, in every import mode of pytest

from guard_env import Env

from hal.guard import uninstall


@pytest.fixture(scope="module")  # its default process group must not outlive these tests
def env() -> Iterator[Env]:
    uninstall()
    env = Env()
    yield env
    uninstall()
    env.close()
