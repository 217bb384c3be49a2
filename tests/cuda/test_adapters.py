"""Adapters on a GPU: four in one batch and none, against transformers in fp64 with each merged into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters_by_hand
import checkpoints
import families
import pytest
import torch

from hal.sampling.params import SamplingParams

PROMPTS = checkpoints.prompts(5)


def assert_parity(name: str, folder: Path, **options: Any) -> None:
    path = families.save(name, folder / "model")
    only = r"self_attn\.(q_a|q_b|o)_proj|self_attn\.kv_a|layers\.0\.mlp|shared_experts" if name == "deepseek-v3" else ""
    written = [adapters_by_hand.write(folder / str(i), path, i, r=2 + 5 * i, only=only) for i in range(4)]
    merged = [adapters_by_hand.merge(path, directory, folder / f"merged-{i}") for i, directory in enumerate(written)]
    with families.run(path, "cuda", **{"max_num_seqs": 8, "max_adapters": 4, "max_adapter_rank": 17, **options}) as llm:
        for i, directory in enumerate(written):
            llm.load_adapter(str(i), directory)
        outputs = llm.generate(PROMPTS, [SamplingParams(max_tokens=24, logprobs=1, ignore_eos=True, adapter=adapter)
                                         for adapter in ("0", "1", "2", "3", None)])
    for directory, prompt, output in zip([*merged, path], PROMPTS, outputs, strict=True):
        families.assert_parity(directory, [prompt], [output], 5e-4)


@pytest.mark.parametrize("options", [
    {}, {"graphs": False}, {"async_scheduling": False, "max_num_batched_tokens": 16}, {"steps_per_message": 4},
    {"num_blocks": 40, "max_model_len": 100, "num_cpu_blocks": 40}, {"speculate": "ngram"}], ids=str)
def test_modes(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_parity("llama", tmp_path, **options)


@pytest.mark.parametrize("name", ["phi3", "glm4", "deepseek-v3"])
def test_families(tmp_path: Path, name: str) -> None:
    assert_parity(name, tmp_path)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_two_gpus(tmp_path: Path, layout: dict[str, int]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("requires two GPUs")
    assert_parity("llama", tmp_path, **layout)


def test_graphs_with_and_without(tmp_path: Path) -> None:
    """A load while graphs exist is seen by the next replay; a batch without adapters replays the other graphs."""
    path = families.save("llama", tmp_path / "model")
    one, two = (adapters_by_hand.write(tmp_path / str(i), path, i) for i in range(2))
    with families.run(path, "cuda", dtype="bfloat16", max_num_seqs=4, max_adapters=1) as llm:
        runner = llm.executor._worker.runner  # type: ignore[attr-defined]
        assert set(runner.adapted) == set(runner.graphs)
        found, captured = [], runner.compiled
        for directory in (one, two, one):
            llm.load_adapter("a", directory)
            params = [SamplingParams(max_tokens=12, ignore_eos=True, adapter=name) for name in ("a", None)]
            found.append([output.token_ids for output in llm.generate(PROMPTS[:2], params)])
            llm.unload_adapter("a")
        assert found[0][0] == found[2][0] != found[1][0] and found[0][1] == found[1][1]
        assert runner.compiled == captured
