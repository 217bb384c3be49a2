"""A sample of the failure drill; the script runs all of it."""

from __future__ import annotations

import drill
import pytest
from drill import Case, cases, run


def test_the_drill_has_at_least_forty_cases() -> None:
    assert len(set(cases())) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("case", cases()[3::8], ids=str)
def test_failures_are_named_and_leave_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_FAULT", "")  # put back afterwards
    monkeypatch.setattr(drill, "SLACK", 20.0)  # the script shows how soon an error comes
    run(case)
