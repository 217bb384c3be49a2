"""A request has the same bits in any batch (batch_invariant), over many random mixes, in graphs and in eager steps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

# Large enough that cuBLAS has several kernels to choose from; one head size beside the usual, and biases.
SHAPE = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 5632,
         "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32001,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
         "eos_token_id": None, "bos_token_id": None}
WATCHED = [SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3),
           SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3, temperature=0.9, top_p=0.9, seed=5),
           SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3, temperature=1.1, seed=6)]


def differences(directory: Path, mixes: int, **options: Any) -> list[str]:
    """Where watched requests among random others, in random order, differ from themselves alone. Prompts are cut into
    chunks by what else is in a step."""
    (directory / "config.json").write_text(json.dumps(SHAPE))
    draw, found = random.Random(0), list[str]()
    sizes = {"max_num_seqs": 72, "max_num_batched_tokens": 256, "max_model_len": 1024, "num_blocks": 2500, "seed": 0}

    def prompt(length: int) -> list[int]:
        return [draw.randrange(SHAPE["vocab_size"]) for _ in range(length)]  # type: ignore[call-overload]

    watched = [prompt(n) for n in (300, 33, 700)]
    with LLM(str(directory), random_weights=True, prefix_caching=False, **(sizes | options)) as llm:
        def bits(outputs: list[Any]) -> list[Any]:
            return [(o.token_ids, o.logprobs) for o in outputs]

        alone = [bits(llm.generate([p], [each]))[0] for p, each in zip(watched, WATCHED, strict=True)]
        for mix in range(mixes):
            n = draw.choice((0, 1, 2, 7, 15, 16, 31, 44, 64, draw.randint(0, 64)))
            jobs = [(p, each, i) for i, (p, each) in enumerate(zip(watched, WATCHED, strict=True))]
            jobs += [(prompt(draw.randint(1, 200)), SamplingParams(
                max_tokens=draw.randint(1, 16), ignore_eos=True, temperature=draw.choice((0.0, 1.0))), -1)
                for _ in range(n)]
            draw.shuffle(jobs)
            outputs = bits(llm.generate([job[0] for job in jobs], [job[1] for job in jobs]))
            found += [f"mix {mix}, {n} others: request {i}" for (_, _, i), got in zip(jobs, outputs, strict=True)
                      if i >= 0 and got != alone[i]]
    return found


@pytest.mark.parametrize("options", [
    {"dtype": "bfloat16"}, {"dtype": "bfloat16", "graphs": False}, {"dtype": "float32"}, {"dtype": "float16"},
    {"dtype": "bfloat16", "kv_dtype": "fp8"}, {"dtype": "bfloat16", "quantize": "int8"},
    {"dtype": "bfloat16", "quantize": "fp8"}, {"dtype": "bfloat16", "steps_per_message": 4}], ids=str)
def test_the_same_bits_in_any_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    mixes = 200 if options == {"dtype": "bfloat16"} else 25
    assert not differences(tmp_path, mixes, device="cuda", batch_invariant=True, **options)


def test_the_option_is_what_makes_them_the_same(tmp_path: Path) -> None:
    assert differences(tmp_path, 10, device="cuda", dtype="bfloat16")


@pytest.mark.parametrize("device", ["cuda", "runners.cuda:shared_gpu"])
def test_the_same_bits_on_two_ranks(tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("requires two GPUs")
    mixes, share = (50, 0.9) if device == "cuda" else (5, 0.3)
    assert not differences(tmp_path, mixes, device=device, dtype="bfloat16", batch_invariant=True, tp=2,
                           memory_fraction=share)
