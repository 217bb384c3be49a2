"""The tests of the plug-in: one for each case and dtype."""

from __future__ import annotations

from pathlib import Path

import pytest

from hal.conformance.case import Case
from hal.conformance.run import Kit


def test_conformance(hal_kit: tuple[Kit, Path], hal_case: tuple[Case, str]) -> None:
    kit, scratch = hal_kit
    result = kit.result(*hal_case, scratch)
    if result.status == "n/a":
        pytest.skip(result.text)
    if result.status == "xfail":
        pytest.xfail(f"{result.text} {result.link}")
    if result.status != "pass":
        pytest.fail(f"{result.text}\nto repeat: {result.command}", pytrace=False)
