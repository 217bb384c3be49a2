from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoints
import families
import pytest


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return checkpoints.made_once(families.save, tmp_path_factory)
