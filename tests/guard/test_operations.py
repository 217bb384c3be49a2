"""Every operation of guard_cases under both tiers, in every phase; their outcomes make the table in docs/guard.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from types import CodeType

import pytest
from guard_cases import CASES, Case
from guard_env import Env
from guard_env import __file__ as env_file

from hal.errors import GuardError
from hal.guard import Phase, allow, data_plane, install, phase, uninstall

RANK = 3
DOCS = Path(__file__).parents[2] / "docs" / "guard.md"
START, END = "<!-- guard-table -->\n", "<!-- /guard-table -->"

pytestmark = [
    pytest.mark.torch_release,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module", params=["always", "strict"])
def tier(request: pytest.FixtureRequest, env: Env) -> Iterator[str]:
    install(strict=request.param == "strict")
    yield request.param
    uninstall()


def attempt(case: Case, env: Env, *regions: AbstractContextManager[object]) -> GuardError | None:
    """The GuardError with which the innermost of `regions` refused the operation, or None if it was let through."""
    if case.setup is not None:
        case.setup(env)
    try:
        with regions[0], regions[1] if len(regions) > 1 else nullcontext():
            case.act(env)
    except GuardError as error:
        return error
    except case.errors:
        pass
    return None


def lines(code: CodeType) -> set[int]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return {line for _, _, line in code.co_lines() if line}.union(*(lines(const) for const in inner))


def skip_if_missing(case: Case) -> None:
    if case.missing:
        pytest.skip(f"requires {case.missing}, which this torch does not have")


# The first of each family runs in `make test-fast` too.
@pytest.mark.parametrize("case", [
    pytest.param(case, id=f"{case.family}: {case.name}", marks=[pytest.mark.slow] * (i > 0))
    for _, members in groupby(CASES, lambda case: case.family) for i, case in enumerate(members)])
def test_operation(case: Case, tier: str, env: Env) -> None:
    skip_if_missing(case)
    refused = case.tier == "always" or case.tier == tier
    for step in (Phase.PREPARE, Phase.EXECUTE):
        error = attempt(case, env, phase(step, RANK))
        assert (error is not None) == refused, f"{step}: {error}"
        if error is not None:
            check(error, case, step)
        assert attempt(case, env, phase(step, RANK), allow("test")) is None
    assert attempt(case, env, phase(Phase.EXECUTE, RANK), data_plane("test")) is None
    error = attempt(case, env, phase(Phase.PREPARE, RANK), data_plane("test"))
    assert error is not None and error.operation == "test"
    assert attempt(case, env, phase(Phase.WORKER, RANK)) is None
    assert attempt(case, env, phase(Phase.WORKER, RANK), data_plane("test")) is None
    assert attempt(case, env, nullcontext()) is None


def check(error: GuardError, case: Case, step: Phase) -> None:
    assert error.phase == step.value
    assert error.operation == case.operation
    file, _, line = error.site.rpartition(":")
    assert file == (env_file if case.family.startswith("inside") else case.act.__code__.co_filename)
    if not case.family.startswith(("asyncio", "inside")):  # sites in the coroutine or compiled code
        assert int(line) in lines(case.act.__code__)
    text = str(error)
    assert f"phase {step.value} of rank {RANK}" in text and case.operation in text and error.site in text
    assert error.hint and "allow(reason)" in error.hint


@pytest.mark.slow
def test_table_in_docs(env: Env) -> None:
    """Made of outcomes, not of what the cases declare. An operation this torch lacks is taken as declared."""
    rows = [(case, outcome(case, env)) for case in CASES]
    table = ["| operations | refused by tier | prepare | execute | execute, in data_plane | worker |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for (family, cells), members in groupby(rows, lambda row: (row[0].family, row[1])):
        names = ", ".join(f"`{case.name}`" for case, _ in members)
        table.append(f"| **{family}**: {names} | " + " | ".join(cells) + " |")
    made = "\n".join(table) + "\n"
    text = DOCS.read_text()
    before, rest = text.split(START)
    there, after = rest.split(END)
    if os.environ.get("HAL_UPDATE_DOCS") == "1":
        DOCS.write_text(before + START + made + END + after)
        return
    assert there == made, f"{DOCS.name} is out of date: run this test with HAL_UPDATE_DOCS=1"


def outcome(case: Case, env: Env) -> tuple[str, ...]:
    if case.missing:
        return case.tier, "refused", "refused", "passes", "passes"
    for name in ("always", "strict"):
        install(strict=name == "strict")
        try:
            cells = [
                "passes" if attempt(case, env, *regions) is None else "refused"
                for regions in (
                    (phase(Phase.PREPARE),),
                    (phase(Phase.EXECUTE),),
                    (phase(Phase.EXECUTE), data_plane("test")),
                    (phase(Phase.WORKER),),
                )
            ]
        finally:
            uninstall()
        if "refused" in cells:
            return name, *cells
    return "none", *cells
