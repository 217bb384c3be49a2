"""What ships: imports that stay light, and a bundled model that is right by an independent implementation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "hal" / "assets" / "add-tiny"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["hal", "hal.errors", "hal.guard", "hal.config", "hal.profiling", "hal.cli",
                                    "hal.sampling.params", "runners.cpu"])
def test_import_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_import_takes_under_50_ms() -> None:
    """Of a processor's time: other processes may have the processor meanwhile."""
    code = "import time; t = time.process_time(); import hal; print(time.process_time() - t)"
    times = [float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
             for _ in range(3)]
    assert min(times) < 0.050, times


@pytest.mark.slow
def test_the_cpu_runner_needs_neither_cuda_nor_xla() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch_xla", "triton", "intel_extension_for_pytorch")))  # importing them fails
import torch
torch.cuda.is_available = torch.cuda.init = torch.cuda._lazy_init = None
from runners.cpu.runner import CpuModelRunner
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bundled_model_adds(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    problems = [json.loads(line) for line in (ASSET / "heldout.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(ASSET, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=dtype, trust_remote_code=False)
    inputs = tokenizer([p["prompt"] for p in problems], return_tensors="pt", padding=True)
    output = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=6,
                            do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
    right = sum(text == p["answer"] for text, p in zip(texts, problems, strict=True))
    assert len(problems) == 1000 and right >= 990, f"{right} of {len(problems)}"


def test_a_distribution_carries_the_licence(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # building writes beside the sources
        shutil.copy(ROOT / name, tmp_path)
    code = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    metadata = tmp_path / built.stdout.split()[-1]
    assert "License-Expression: Apache-2.0" in (metadata / "METADATA").read_text()
    assert (metadata / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
