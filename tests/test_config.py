"""EngineConfig's own checks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hal import LLM, SamplingParams
from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, EngineConfig, Topology, WorkerConfig
from hal.errors import ConfigError


def test_a_model_below_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank gets the expanded path: another process may have another home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(BUNDLED_MODEL, tmp_path / "adder")
    config = EngineConfig(model="~/adder")
    assert config.model == str(tmp_path / "adder") and EngineConfig(model="a~/~").model == "a~/~"
    there = WorkerConfig(config, read_config(config.model), Topology())
    monkeypatch.setenv("HOME", "/elsewhere")
    assert WorkerConfig.from_json(there.to_json()) == there
    monkeypatch.setenv("HOME", str(tmp_path))
    with LLM("~/adder", device="cpu", num_blocks=64) as llm:
        assert llm.generate("37+85=", SamplingParams(max_tokens=8))[0].text == "122"


@pytest.mark.parametrize("model", ["", None, 3, b"x", ["x"]])
def test_a_model_that_is_no_path_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="model is not usable"):
        EngineConfig(model=model)
