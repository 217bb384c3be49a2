"""EngineConfig's own checks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal import LLM, SamplingParams
from hal.checkpoints.hf_config import read_config
from hal.config import AXES, BUNDLED_MODEL, EngineConfig, Topology, WorkerConfig
from hal.contracts.backend import load
from hal.contracts.executor import make_executor
from hal.errors import ConfigError
from hal.models import check_topology


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


def test_an_executor_refuses_a_context_that_the_model_does_not_have() -> None:
    """An engine of one's own calls make_executor without LLM."""
    model = read_config(str(BUNDLED_MODEL))
    longest = EngineConfig(device="null", max_model_len=model.max_position)
    assert WorkerConfig(longest, model, Topology()).max_model_len == model.max_position
    longer = replace(longest, max_model_len=model.max_position + 1, tp=2)
    with pytest.raises(ConfigError, match="longer than the model's context") as error:
        make_executor(longer, model, load("null"))
    assert str(model.max_position) in error.value.expected


MESHES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6)).filter(lambda m: m[0] % m[2] == 0)


@given(mesh=MESHES)
def test_the_groups_of_an_axis_are_the_lines_of_the_mesh(mesh: tuple[int, int, int]) -> None:
    """An array whose indices are the coordinates holds the ranks; a group is what one index runs through."""
    tp, pp, ep = mesh
    ranks = np.arange(tp * pp).reshape(pp, ep, tp // ep)
    for topology in Topology(tp, pp, ep=ep).every_rank():
        at = tuple(int(i) for i in np.argwhere(ranks == topology.rank)[0])
        assert (topology.pp_rank, topology.ep_rank) == at[:2]
        lines = {"tp": ranks[at[0]].ravel(), "pp": ranks[:, at[1], at[2]], "ep": ranks[at[0], :, at[2]]}
        for name in AXES:
            axis = topology.axis(name)
            assert (axis.name, axis.size, axis.ranks) == (name, len(lines[name]), tuple(lines[name].tolist()))
            assert axis.ranks[axis.rank] == topology.rank
    assert [t.samples for t in topology.every_rank()].index(True) == topology.sampling_rank == ranks[-1].ravel()[0]


def test_an_axis_that_the_mesh_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no such axis.*got: 'dp'.*tp, pp, ep"):
        Topology(tp=2).axis("dp")


def test_ep_must_divide_tp_and_needs_experts() -> None:
    with pytest.raises(ConfigError, match=r"(?s)ep=2, tp=3.*divides tp"):
        EngineConfig(tp=3, ep=2)
    assert WorkerConfig.from_json(WorkerConfig(EngineConfig(tp=4, ep=2), read_config(BUNDLED_MODEL),
                                               Topology(4, 2, 5, 2)).to_json()).topology == Topology(4, 2, 5, 2)
    with pytest.raises(ConfigError, match=r"(?s)needs a model with experts.*ep=2.*ep=1: \w+ has no experts"):
        check_topology(read_config(BUNDLED_MODEL), Topology(tp=2, ep=2))
