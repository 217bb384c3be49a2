"""The same bits in any batch (EngineConfig.batch_invariant): on the CPU over random mixes, and refused elsewhere."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, EngineConfig, Topology, WorkerConfig
from hal.contracts.backend import load
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.executor import make_executor
from hal.engine.llm import LLM
from hal.errors import BackendError, ConfigError
from hal.models.layers import Build, Linear
from hal.sampling.params import SamplingParams
from hal.weights import LinearSpec, Projection
from hal.weights.eight_bits import EightBits
from runners.cpu.invariant import InvariantAttention, InvariantOps
from runners.cpu.ops import CpuOps

# Wide enough that threads share tensors, with a size that no vector's length divides, and one head for each key.
SHAPE = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 432, "intermediate_size": 1390,
         "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 40001,
         "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
         "eos_token_id": None, "bos_token_id": None}


def differences(directory: Path, mixes: int, **options: Any) -> int:
    """Of watched requests among random others, how many differ from themselves alone."""
    (directory / "config.json").write_text(json.dumps(SHAPE))
    draw, found = random.Random(0), 0
    watched = [[draw.randrange(40000) for _ in range(n)] for n in (90, 17)]
    params = [SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2),
              SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2, temperature=0.9, top_p=0.9, seed=3)]
    with LLM(str(directory), device="cpu", random_weights=True, prefix_caching=False, max_num_seqs=32, num_blocks=300,
             max_num_batched_tokens=96, **options) as llm:
        alone = [llm.generate([p], each)[0] for p, each in zip(watched, params, strict=True)]
        for _ in range(mixes):
            others = [[draw.randrange(40000) for _ in range(draw.randint(1, 30))] for _ in range(draw.randint(0, 16))]
            short = [SamplingParams(max_tokens=3, ignore_eos=True)] * len(others)
            got = llm.generate([*others, *watched], short + params)
            found += sum((a.token_ids, a.logprobs) != (b.token_ids, b.logprobs)
                         for a, b in zip(got[len(others):], alone, strict=True))
    return found


@pytest.mark.slow
@pytest.mark.torch_release
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_mixes_with_two_threads(tmp_path: Path, dtype: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert differences(tmp_path, 4, dtype=dtype, batch_invariant=True) == 0
        assert dtype != "float32" or differences(tmp_path, 1, dtype=dtype) > 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_random_mixes_with_few_bit_weights(tmp_path: Path, scheme: str) -> None:
    assert differences(tmp_path, 2, dtype="bfloat16", batch_invariant=True, quantize=scheme) == 0


def test_inputs_that_share_a_scale_of_the_whole_step_are_refused() -> None:
    layer = LinearSpec(64, (Projection("q_proj", 32),), "out")
    for ops, inputs in ((InvariantOps(), "tensor"), (InvariantOps(), "token"), (CpuOps(), "tensor")):
        build = Build(Topology(), LocalCommunicator(), ops, torch.float32, torch.device("cpu"),
                      lambda name, inputs=inputs: EightBits("fp8", "tensor", inputs))
        refused = pytest.raises(ConfigError, match="batch_invariant has no product for inputs that are rounded by one")
        with refused if (type(ops), inputs) == (InvariantOps, "tensor") else contextlib.nullcontext():
            Linear(build, layer, bias=False)


@pytest.mark.parametrize("options", [{"tp": 4}, {"speculate": "ngram"}], ids=str)
def test_what_has_no_single_order_of_sums_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batch_invariant has one order"):
        EngineConfig(batch_invariant=True, **options)
    assert EngineConfig(batch_invariant=True, tp=2).batch_invariant


def test_a_backend_that_does_not_offer_it_is_refused() -> None:
    config = EngineConfig(device="fake", batch_invariant=True, num_blocks=8)
    with pytest.raises(BackendError, match="does not offer the same bits in any batch"):
        make_executor(config, read_config(BUNDLED_MODEL), load("fake"))


def test_a_model_without_such_kernels_is_refused() -> None:
    model = replace(read_config(BUNDLED_MODEL), family="transformers")
    with pytest.raises(ConfigError, match="batch_invariant has no kernels for this model"):
        WorkerConfig(EngineConfig(batch_invariant=True), model, Topology())
    from hal.contracts.attention import AttentionSpec

    with pytest.raises(ConfigError, match="does not have the attention of this model"):
        InvariantAttention([AttentionSpec(4, 2, 16, 0.3, softcap=5.0)], device=torch.device("cpu"), dtype=torch.float32)
