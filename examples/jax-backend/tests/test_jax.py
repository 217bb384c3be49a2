"""The JAX example is right, as the kit says, and is what its README says."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from hal_jax import backend, model

from hal.config import EngineConfig, Topology, WorkerConfig
from hal.conformance.cases.guard import GOLDEN
from hal.conformance.context import GREEDY, Context, drive
from hal.conformance.run import Options, run
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError
from hal.model_config import ExpertsConfig, ModelConfig
from hal.recording.bisect import bisect

ROOT = Path(__file__).parents[3]


def test_it_is_conformant() -> None:
    report = run(Options("hal_jax:backend", dtypes=("float32",), examples=5))
    assert report.verdict.startswith("Conformant L6 (float32)"), report.failed


def test_spmd_shares_tensors_among_the_devices_of_one_process() -> None:
    cases = "L0/*", "L3/model/llama", "L3/model/qwen3", "L5/layout/*", "L6/*"
    report = run(Options("hal_jax:spmd", cases=cases, dtypes=("float32",), examples=5))
    status = {result.case.name: result.status for result in report.results}
    assert not report.failed
    assert [status[f"L5/layout/{name}"] for name in ("tp2", "tp2_pp2", "tp4_shared_heads")] == ["pass"] * 3


def test_a_step_takes_the_cache_over(tmp_path: Path) -> None:
    ctx = Context(backend, "hal_jax:backend", "bfloat16", 0, scratch=tmp_path)
    session = ctx.session()
    taken = []

    def step(request: Any) -> Any:
        before = session.caches[0]
        output = session.step(request)
        taken.append(before.is_deleted())
        return output

    runs = drive(step, session.scheduler(), ctx.prompts(20, 3), GREEDY)
    assert taken and all(taken)
    ctx.verify(runs)


def test_bisect_names_the_layer_with_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    path, right = GOLDEN / "cpu-float32-greedy.safetensors", model.mlp
    found = bisect(path, "hal_jax:backend", "runners.cpu:backend")
    assert found.divergence is None and found.flip is None and found.calls > 100

    def wrong(p: Any, w: Any, layer: Any, x: Any, out: Any) -> Any:
        x, down, noted = right(p, w, layer, x, out)
        down = down * jnp.where(layer == 2, 1.02, 1.0)
        return x, down, {**noted, "mlp.down": down}

    monkeypatch.setattr(model, "mlp", wrong)
    divergence = bisect(path, "hal_jax:backend", "runners.cpu:backend").divergence
    assert divergence is not None
    assert (divergence.step, divergence.call.layer, divergence.call.name) == (0, 2, "layers.2.mlp.down")


def test_programs_are_compiled_ahead_and_kept(tmp_path: Path) -> None:
    """A second process compiles nothing that the first one has kept."""
    words = ["--device", "hal_jax:backend", "--num-blocks", "33", "--max-num-seqs", "2",
             "--max-num-batched-tokens", "16", "--max-model-len", "64", "--json"]
    counts = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-m", "hal", "compile", *words], capture_output=True, text=True,
                              timeout=300, env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        folder, = json.loads(done.stdout)["folders"]
        assert folder["path"] == str(tmp_path) and folder["bytes"] > 1000
        counts.append(folder["new_files"])
    assert counts[0] >= 6 and counts[1] == 0


def test_models_with_other_layers_are_refused() -> None:
    experts = ExpertsConfig(count=4, per_token=2, size=32, layers=(0, 1))
    shape = ModelConfig(family="llama", architecture="MixtralForCausalLM", vocab_size=64, hidden_size=32, num_layers=2,
                        num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=32, max_position=64, experts=experts,
                        dtype="float32")
    config = WorkerConfig(EngineConfig(device="hal_jax:backend", random_weights=True), shape, Topology())
    runner = backend.make_runner(config, torch.device("cpu"), LocalCommunicator())
    with pytest.raises(ConfigError, match=r"does not have this model's layers[\s\S]*MixtralForCausalLM"):
        runner.load_model()


def test_it_is_small() -> None:
    code_lines = runpy.run_path(str(ROOT / "tests" / "line_budget.py"))["code_lines"]
    assert sum(map(code_lines, (ROOT / "examples" / "jax-backend" / "hal_jax").glob("*.py"))) <= 450
