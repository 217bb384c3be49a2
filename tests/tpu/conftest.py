"""XLA's CPU client for these tests, with as little compiling as its plan allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ENVIRONMENT = {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--xla_backend_optimization_level=0", "HAL_COMPILE_BUDGET": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.tpu)


@pytest.fixture(scope="session", autouse=True)
def xla_on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def xla(xla_on_cpu: None) -> None:
    from runners.tpu import backend

    reason = backend.unavailable()
    if reason is not None:
        pytest.skip(f"requires torch_xla on its CPU client: {reason}")
