"""XLA's CPU client for these tests, with as little compiling as its plan allows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

ENVIRONMENT = {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--xla_backend_optimization_level=0", "HAL_COMPILE_BUDGET": "1"}


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
