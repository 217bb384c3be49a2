"""Backends that were written against a version of hal.contracts, and are never edited, run under this one."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hal.conformance.run import Options, run
from hal.errors import BackendError

FROZEN = Path(__file__).parent / "frozen"
DIGESTS = {"composed_2_0": "16670698338a0143", "direct_2_0": "232c92439298ea98"}
QUICK = ("L0/*", "L1/prepare/*", "L2/linear/linear", "L2/norm/rms*", "L2/rotary/*", "L2/attention/[dw]*",
         "L2/sampler/g*", "L3/model/llama", "L3/scheduling/p*", "L3/sampling/by*", "L3/steps/*", "L3/speculation/*",
         "L3/cache/*")
# What is broken on purpose: the object that loses a name, the name, and the frozen backend that must notice it.
BROKEN = [("hal.schema", "stays", "composed_2_0"),
          ("hal.models.ops:Ops", "norm_linear", "composed_2_0"),
          ("hal.contracts.attention", "refuse_unsupported", "composed_2_0"),
          ("hal.sampling.sampler:Sampler", "greedy", "composed_2_0"),
          ("hal.schema.packed:Packed", "to", "composed_2_0"),
          ("hal.paged.batch:BatchState", "apply", "direct_2_0"),
          ("hal.paged.pending:PendingTokens", "keep", "direct_2_0"),
          ("hal.paged.steps", "take_steps", "direct_2_0")]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FROZEN))
    yield
    for name in DIGESTS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", DIGESTS)
def test_it_is_not_edited(name: str) -> None:
    """A changed contract gets a new version and a copy beside this one; the file of the old version stays."""
    assert hashlib.sha256((FROZEN / f"{name}.py").read_bytes()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGESTS)
def test_it_still_conforms(name: str) -> None:
    report = run(Options(f"{name}:backend", level=3, examples=5, cases=QUICK, dtypes=("float32",)))
    assert not report.failed and sum(r.status == "pass" for r in report.results) > 15, report.failed


@pytest.mark.parametrize(("owner", "attribute", "name"), BROKEN, ids=[entry[1] for entry in BROKEN])
def test_a_broken_contract_is_named(owner: str, attribute: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, kind = owner.partition(":")
    broken: Any = importlib.import_module(module)
    monkeypatch.delattr(getattr(broken, kind) if kind else broken, attribute)
    try:
        found = run(Options(f"{name}:backend", cases=("L3/model/llama", "L3/steps/*"), dtypes=("float32",))).failed
        told = "\n".join(result.text for result in found)
    except BackendError as error:  # the module does not even load
        told = str(error)
    assert attribute in told


def test_another_major_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal.contracts import backend as backends

    monkeypatch.setattr(backends, "VERSION", "3.0")
    with pytest.raises(BackendError, match=r"written for another version of hal.contracts(.|\n)*2.0"):
        run(Options("composed_2_0:backend"))
