"""The installed vLLM is one that this package was written for. These tests read its source, and import none of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hal_vllm import surface

found = surface.installed()
needs_vllm = pytest.mark.skipif(found is None, reason="vLLM is not installed")


@needs_vllm
def test_the_installed_release_is_as_recorded() -> None:
    assert found is not None
    directory, release = found
    recorded = surface.read_recorded(release)
    assert recorded is not None, f"vLLM {release} is not supported; supported: {surface.supported()}"
    assert not surface.differences(recorded, surface.surface(directory))


def test_two_releases_are_supported() -> None:
    assert len(surface.supported()) >= 2


def test_a_difference_is_named() -> None:
    recorded = surface.read_recorded(surface.supported()[-1])
    assert recorded is not None
    later = copy.deepcopy(recorded)
    later["SamplingParams"]["top_z"] = "float"
    del later["SchedulerOutput"]["finished_req_ids"]
    later["Executor"]["check_health"] = "(self, deep)"
    assert surface.differences(recorded, later) == [
        "Executor.check_health was (self) and is (self, deep)", "SamplingParams.top_z is new: float",
        "SchedulerOutput.finished_req_ids is gone: set[str]"]


@pytest.mark.parametrize("release", surface.supported())
def test_every_sampling_parameter_of_a_supported_release_is_on_a_list(release: str) -> None:
    """The lists are read from the source, since their module imports vLLM."""
    source = (Path(surface.__file__).with_name("params.py")).read_text()
    recorded = surface.read_recorded(release)
    assert recorded is not None
    fields = {name for name, kind in recorded["SamplingParams"].items() if not kind.startswith("(")}
    assert len(fields) > 30 and not {name for name in fields if f'"{name}"' not in source}
