"""The installed vLLM is one that this package was written for. These tests read its source, and import none of it."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

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


@needs_vllm
def test_a_made_up_parameter_of_an_installed_vllm_is_named(tmp_path: Path) -> None:
    """A copy of the installed source gets a new parameter, a new field of a step and a new option."""
    assert found is not None
    directory, release = found
    for file in (*surface._CLASSES, *surface._CALLS):
        text, target = (directory / file).read_text(), tmp_path / file
        for line, more in (("    min_p: float = 0.0\n", "    top_z: float = 0.0\n"),
                           ("    has_sync_kv_loads: bool = False\n", "    made_up: dict | None = None\n"),
                           ("    load_format: str", "    speed: int = 1\n    load_format: str")):
            text = text.replace(line, more if line in more else line + more)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    recorded = surface.read_recorded(release)
    assert recorded is not None
    assert surface.differences(recorded, surface.surface(tmp_path)) == [
        "LoadConfig.speed is new: int", "SamplingParams.top_z is new: float",
        "SchedulerOutput.made_up is new: dict | None"]


def literal(module: str, *names: str) -> list[Any]:
    """The values of constants of a module, sets where it calls `frozenset`. Its import would import vLLM."""
    tree = ast.parse(Path(surface.__file__).with_name(module).read_text())
    values = {node.targets[0].id: node.value for node in tree.body
              if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    return [set(ast.literal_eval(value.args[0])) if isinstance(value := values[name], ast.Call)
            else ast.literal_eval(value) for name in names]


def recorded_fields() -> dict[str, set[str]]:
    """The fields of every recorded class, in any supported release."""
    every: dict[str, set[str]] = {}
    for release in surface.supported():
        for name, members in (surface.read_recorded(release) or {}).items():
            every.setdefault(name, set()).update(f for f, kind in members.items() if not kind.startswith("("))
    return every


def test_every_parameter_and_field_of_a_supported_release_is_on_a_list() -> None:
    every = recorded_fields()
    carried, engine, refused = literal("params.py", "CARRIED", "ENGINE", "REFUSED")
    assert len(every["SamplingParams"]) > 30 and every["SamplingParams"] <= carried | engine | refused
    read, idle = literal("fields.py", "READ", "IDLE")
    for name in read:
        assert read[name] | idle[name] <= every[name], name


def test_every_allowed_option_is_one_of_a_supported_release() -> None:
    every = recorded_fields()
    allowed, = literal("allowed.py", "ALLOWED")
    for part, options in allowed.items():
        kind = "VllmConfig" if not part else part.title().replace("_", "")
        assert options <= every[kind], kind
