"""Tensor parallelism by SPMD on virtual CPU devices: tokens, and what the compiler made of it. SPMD is of a whole
process, so each layout has one of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import parity
import pytest

pytestmark = [pytest.mark.torch_release, pytest.mark.usefixtures("xla")]
Checkpoint = Callable[[str], Path]
_SCRIPT = """
import json, sys
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams
path, prompts, options = json.loads(sys.argv[1])
with LLM(path, device="runners.tpu:backend", dtype="float32", block_size=4, max_num_seqs=4, max_model_len=128,
         max_num_batched_tokens=24, num_blocks=200, **options) as llm:
    seeded = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=7)
    print(json.dumps([[o.token_ids for o in llm.generate(prompts, p)] for p in
                      (SamplingParams(max_tokens=64), SamplingParams(max_tokens=64), seeded)]))
"""
_COLLECTIVE = re.compile(r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
_ALIASES = re.compile(r"input_output_alias=\{(.*?)\}, entry_computation_layout")


def run(path: Path, dump: Path, tp: int) -> tuple[list[list[list[int]]], list[str]]:
    """Tokens, and the optimised HLO of the step programs."""
    environment = os.environ | {"CPU_NUM_DEVICES": str(tp), "HAL_STRICT": "1", "XLA_FLAGS": (
        f"{os.environ['XLA_FLAGS']} --xla_dump_to={dump} --xla_dump_hlo_as_text")}
    arguments = json.dumps([str(path), parity.PROMPTS, {"tp": tp}])
    done = subprocess.run([sys.executable, "-c", _SCRIPT, arguments], env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [p.read_text() for p in dump.glob("*after_optimizations.txt")]
    return json.loads(done.stdout.splitlines()[-1]), [t for t in texts if "input_output_alias" in t and "dot(" in t]


@pytest.mark.parametrize(("name", "tp"), [
    ("llama3-gqa", 2), ("gpt2", 4), pytest.param("llama3-gqa", 4, marks=pytest.mark.slow),  # 2 kv heads for 4 ranks
    pytest.param("qwen3", 2, marks=pytest.mark.slow), pytest.param("qwen2-tied", 2, marks=pytest.mark.slow),
    pytest.param("llama-linear-biases", 2, marks=pytest.mark.slow)])
def test_shares_of_one_process(checkpoint: Checkpoint, tmp_path: Path, name: str, tp: int) -> None:
    tokens, programs = run(checkpoint(name), tmp_path, tp)
    expected = [greedy for greedy, _ in parity.oracle(checkpoint(name))]
    assert tokens[0] == expected and tokens[1] == expected  # the second finds its prompts in the prefix cache
    if tp == 2:
        from hal.engine.llm import LLM
        from hal.sampling.params import SamplingParams

        with LLM(str(checkpoint(name)), device="cpu", dtype="float32", block_size=4) as llm:
            outputs = llm.generate(parity.PROMPTS, SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=7))
        assert tokens[2] == [o.token_ids for o in outputs]
    layers = json.loads((checkpoint(name) / "config.json").read_text()).get("num_hidden_layers") or 3
    vocab = -(-checkpoints.VOCAB // tp)
    assert len(programs) == 2  # the plan's one decode and one mixed program
    for text in programs:
        found = _COLLECTIVE.findall(text)
        sums = [shape for shape, kind in found if kind == "all-reduce"]
        others = [(shape, kind) for shape, kind in found if kind != "all-reduce"]
        assert len(sums) == 2 * layers + 1  # and one of the embedding
        assert len(others) == 1 and others[0][1] == "all-gather" and str(vocab) in others[0][0], others  # the logits
        aliases = _ALIASES.search(text)
        assert aliases is not None and aliases[1].count("alias)") == layers
