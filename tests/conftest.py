from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import checkpoints`, in every import mode of pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fake device last: PyTorch has it for the rest of the process, and an older one then refuses barriers."""
    items.sort(key=lambda item: "fake" in item.path.parts)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(name)`: the directory of one of `checkpoints.NAMES`, made on first use."""
    import checkpoints

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = checkpoints.save(name, tmp_path_factory.mktemp("checkpoint") / name)
        return made[name]

    return get
