"""The kit as a pytest plug-in: `pytest --pyargs hal.conformance.suite --hal-backend NAME`. Loads no torch by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hal.conformance.run import Kit


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hal", "conformance of a hal backend")
    group.addoption("--hal-backend", metavar="NAME", help="a backend's name, or module:attribute")
    group.addoption("--hal-level", type=int, default=6, metavar="N", help="highest level (default: 6)")
    group.addoption("--hal-seed", type=int, default=0, metavar="N", help="of weights and prompts (default: 0)")
    group.addoption("--hal-xfail", metavar="FILE", help="TOML or JSON of expected failures")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hal_case" in metafunc.fixturenames:
        kit = _kit(metafunc.config)
        work = kit.work()
        metafunc.parametrize("hal_case", work, ids=[f"{case.name}-{dtype}" for case, dtype in work])


def _kit(config: pytest.Config) -> Kit:
    from hal.conformance.run import Kit, Options

    device: Any = config.getoption("--hal-backend")
    if device is None:
        raise pytest.UsageError("give --hal-backend NAME")
    return Kit(Options(device, config.getoption("--hal-level"), config.getoption("--hal-seed"),
                       expected_file=config.getoption("--hal-xfail")))


@pytest.fixture(scope="session")
def hal_kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kit, Path]]:
    from hal.conformance.run import strict

    with strict():
        yield _kit(request.config), tmp_path_factory.mktemp("hal")
