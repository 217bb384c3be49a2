"""A backend says which version of hal.contracts it was written for, and is refused where that version is not served."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest

from hal.contracts import VERSION
from hal.contracts.backend import load, names, survey
from hal.errors import BackendError
from hal.testing.null import NullBackend

MAJOR, MINOR = map(int, VERSION.split("."))


def named(monkeypatch: pytest.MonkeyPatch, contracts: object) -> str:
    """The name of a backend that declares this version."""
    backend = NullBackend()
    backend.capabilities = replace(backend.capabilities, contracts=contracts)  # type: ignore[arg-type]
    module = ModuleType("vendor_backend")
    module.backend = backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return "vendor_backend:backend"


@pytest.mark.parametrize("minor", sorted({0, MINOR}))
def test_this_version_and_older_minor_ones_load(minor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load(named(monkeypatch, f"{MAJOR}.{minor}")), NullBackend)


@pytest.mark.parametrize("other, hint", [
    (f"{MAJOR - 1}.9", "CHANGELOG.md"), (f"{MAJOR + 1}.0", "a newer hal-runtime"),
    (f"{MAJOR}.{MINOR + 1}", "a newer hal-runtime")])
def test_another_version_is_refused_by_both_names(other: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = named(monkeypatch, other)
    with pytest.raises(BackendError, match="another version of hal") as caught:
        load(name)
    assert caught.value.got == other and VERSION in str(caught.value.expected) and hint in str(caught.value.hint)
    assert other in str(caught.value) and VERSION in str(caught.value)
    backend, reason = survey(name)[name]  # what `hal env` shows
    assert backend is None and other in str(reason)


@pytest.mark.parametrize("version", ["", "2", "2.0.1", "two.zero", None], ids=repr)
def test_a_backend_that_names_no_version_is_refused(version: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="does not say which version") as caught:
        load(named(monkeypatch, version))
    assert VERSION in str(caught.value.expected)


def test_a_backend_that_does_not_import_may_be_for_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vendor_backend")
    module.__getattr__ = lambda name: replace(NullBackend.capabilities, tensor_cores=True)  # type: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(BackendError, match="tensor_cores") as caught:
        load("vendor_backend:backend")
    assert VERSION in str(caught.value.hint)


def test_installed_backends_are_of_this_version() -> None:
    assert {"cpu", "cuda", "fake", "null", "tpu"} <= set(names())
    assert {load(name).capabilities.contracts for name in ("cpu", "cuda", "fake", "null", "tpu")} == {VERSION}
