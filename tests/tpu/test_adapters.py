"""Adapters on XLA's CPU client: several in one batch, loaded between steps without a new program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapters_by_hand
import families
import pytest

from hal.sampling.params import SamplingParams

pytestmark = [pytest.mark.torch_release, pytest.mark.usefixtures("xla")]
TPU = "runners.tpu:backend"
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64, "num_blocks": 100,
                         "max_adapters": 2, "max_adapter_rank": 8}
PROMPTS = [prompt[:20] for prompt in families.PROMPTS]


@pytest.mark.parametrize("options", [{}, pytest.param({"pp": 2}, marks=pytest.mark.slow),
                                     pytest.param({"steps_per_message": 4}, marks=pytest.mark.slow)], ids=str)
def test_two_adapters_and_none_in_one_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    path = families.save("llama", tmp_path / "model")
    written = [adapters_by_hand.write(tmp_path / str(i), path, i, r=4 + 2 * i) for i in range(3)]
    merged = [adapters_by_hand.merge(path, directory, tmp_path / f"merged-{i}") for i, directory in enumerate(written)]
    with families.run(path, TPU, **SMALL, **options) as llm:
        for first in (0, 1):  # the second time the other slot's adapter is another one
            llm.load_adapter("a", written[first])
            llm.load_adapter("b", written[first + 1])
            before = llm.executor._worker.runner.compiled - llm.executor._worker.runner.late
            outputs = llm.generate(PROMPTS, [SamplingParams(max_tokens=8, logprobs=1, ignore_eos=True, adapter=name)
                                             for name in ("a", None, "b")])
            assert llm.executor._worker.runner.compiled - llm.executor._worker.runner.late == before
            for i, expected in enumerate((merged[first], path, merged[first + 1])):
                families.assert_parity(expected, [PROMPTS[i]], [outputs[i]], 2e-4)
            for name in ("a", "b"):
                llm.unload_adapter(name)


_SCRIPT = """
import json, sys
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams
path, prompts, adapters, options = json.loads(sys.argv[1])
with LLM(path, device="runners.tpu:backend", dtype="float32", block_size=4, tp=2, **options) as llm:
    for i, adapter in enumerate(adapters):
        llm.load_adapter(str(i), adapter)
    params = [SamplingParams(max_tokens=8, adapter=name, ignore_eos=True) for name in ("1", None, "0")]
    print(json.dumps([o.token_ids for o in llm.generate(prompts, params)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_shares_of_two_devices(tmp_path: Path, name: str) -> None:
    """SPMD: the tokens are those of the CPU runner."""
    path = families.save(name, tmp_path / "model")
    written = [adapters_by_hand.write(tmp_path / str(i), path, i) for i in range(2)]
    arguments = json.dumps([str(path), PROMPTS, [*map(str, written)], SMALL])
    done = subprocess.run([sys.executable, "-c", _SCRIPT, arguments], env=os.environ | {"CPU_NUM_DEVICES": "2"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with families.run(path, **SMALL) as llm:
        for i, directory in enumerate(written):
            llm.load_adapter(str(i), directory)
        params = [SamplingParams(max_tokens=8, adapter=name, ignore_eos=True) for name in ("1", None, "0")]
        assert json.loads(done.stdout.splitlines()[-1]) == [o.token_ids for o in llm.generate(PROMPTS, params)]
