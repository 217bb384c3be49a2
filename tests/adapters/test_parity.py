"""Several adapters in one batch give what transformers computes, in fp64, with each of them merged into the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters_by_hand
import checkpoints
import families
import pytest
import torch

from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput
from hal.sampling.params import SamplingParams

ROUTE = checkpoints.prompts(5)
KINDS: dict[str, dict[str, Any]] = {
    "all": {}, "rslora": {"use_rslora": True, "r": 6}, "some": {"only": r"(q|k|v|c_attn|down)", "strength": 1.0},
    "ranks": {"ranks": {"o_proj": 2, "c_proj": 3}, "r": 8, "rank_pattern": {"o_proj": 2, "c_proj": 3}}}


def made(checkpoint: Path, folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Four adapters, and five checkpoints: with each merged, and without."""
    written = {name: adapters_by_hand.write(folder / name, checkpoint, seed, **options)
               for seed, (name, options) in enumerate(KINDS.items())}
    return written, [*(adapters_by_hand.merge(checkpoint, path, folder / f"merged-{name}")
                       for name, path in written.items()), checkpoint]


def generate(checkpoint: Path, adapters: dict[str, Path], tokens: int = 24, **options: Any) -> list[RequestOutput]:
    """One prompt for each adapter, and one without, in one batch."""
    with families.run(checkpoint, **{"max_adapters": 4, "max_adapter_rank": 8, **options}) as llm:
        for name, path in adapters.items():
            llm.load_adapter(name, path)
        return llm.generate(ROUTE, [SamplingParams(max_tokens=tokens, logprobs=1, ignore_eos=True, adapter=name)
                                    for name in (*adapters, None)])


def assert_merged(merged: list[Path], outputs: list[RequestOutput], margin: float = 2e-4) -> None:
    for path, prompt, output in zip(merged, ROUTE, outputs, strict=True):
        families.assert_parity(path, [prompt], [output], margin)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow)
                                             for name in ("phi3", "glm4", "gpt2"))])
def test_four_adapters_in_one_batch(family: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path,
                                    name: str) -> None:
    """Fused tensors (phi3), heads whose outputs are put into another order (glm4), weights stored the other way round
    (gpt2)."""
    path = checkpoint(name) if name == "gpt2" else family(name)
    written, merged = made(path, tmp_path)
    outputs = generate(path, written)
    assert_merged(merged, outputs)
    assert len({tuple(output.token_ids[:8]) for output in outputs}) == 5, "the adapters change too little"


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "wire"), [(2, 1, "model-input"), (1, 2, "request"), (4, 1, "model-input")])
def test_on_several_ranks(family: Callable[[str], Path], tmp_path: Path, tp: int, pp: int, wire: str) -> None:
    """With tp=4, two ranks share each key-value head."""
    written, merged = made(family("llama"), tmp_path)
    assert_merged(merged, generate(family("llama"), written, 12, tp=tp, pp=pp, wire=wire))


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"max_num_batched_tokens": 16}, {"num_blocks": 40, "max_model_len": 100}, {"steps_per_message": 4},
    {"num_blocks": 40, "max_model_len": 100, "num_cpu_blocks": 30}, {"speculate": "ngram"},
    {"model_impl": "transformers"}, {"max_adapters": 6, "max_adapter_rank": 32}], ids=str)
def test_every_way_through_an_engine(family: Callable[[str], Path], tmp_path: Path, options: dict[str, Any]) -> None:
    """Chunks of prompts, preemption by recomputing and by swapping, several steps a message, drafts."""
    written, merged = made(family("llama"), tmp_path)
    assert_merged(merged, generate(family("llama"), written, **options))


@pytest.mark.slow
def test_an_adapter_that_peft_trained_and_merges(family: Callable[[str], Path], tmp_path: Path) -> None:
    peft, path = pytest.importorskip("peft"), family("llama")
    torch.manual_seed(0)
    written, merged = {}, []
    for name, options in {"all": {"target_modules": "all-linear"}, "rslora": {"target_modules": ["q_proj", "up_proj"],
                          "use_rslora": True}, "patterns": {"target_modules": r".*\.(o|down)_proj", "rank_pattern":
                          {"o_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {"down_proj": 3}}}.items():
        model = peft.get_peft_model(checkpoints.load(path), peft.LoraConfig(r=4, lora_alpha=10, **options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0.0, 0.2)
        model.save_pretrained(tmp_path / name)
        written[name] = tmp_path / name
        model.merge_and_unload().save_pretrained(tmp_path / f"merged-{name}")
        merged.append(tmp_path / f"merged-{name}")
    written["twice"] = shutil.copytree(written["all"], tmp_path / "twice")
    assert_merged([*merged, merged[0], path], generate(path, written))
    assert json.loads((written["all"] / "adapter_config.json").read_text())["target_modules"] != "all-linear"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_delta_is_added_to_a_quantised_layer(family: Callable[[str], Path], tmp_path: Path, scheme: str) -> None:
    """An adapter whose B is zero changes nothing, and another one does, beside weights in fewer bits."""
    path = family("llama")
    written = {"zero": adapters_by_hand.write(tmp_path / "zero", path, 0, strength=0.0),
               "one": adapters_by_hand.write(tmp_path / "one", path, 1)}
    with families.run(path, quantize=scheme, max_adapters=2) as llm:
        for name, directory in written.items():
            llm.load_adapter(name, directory)
        none, zero, one = llm.generate([ROUTE[0]] * 3, [SamplingParams(max_tokens=8, logprobs=0, adapter=name)
                                                        for name in (None, "zero", "one")])
        layer = llm.executor._worker.runner.model.layers[0].attention.out  # type: ignore[attr-defined]
        x, held = torch.randn(3, layer.in_size), layer.adapters
        held.step.begun = None
        plain = layer(x)
        llm.executor._worker.runner.adapters.begin(torch.tensor([1, -1, 0], dtype=torch.int32))  # type: ignore[attr-defined]
        expected = plain + torch.stack([(x[0] @ held.a[1].t()) @ held.b[1].t(), plain[1] * 0, plain[2] * 0])
        torch.testing.assert_close(layer(x), expected)
    assert zero.token_ids == none.token_ids and one.token_ids != none.token_ids


def test_latent_attention_and_shared_experts(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Of DeepSeek's attention all maps but the folded one take adapters."""
    path = family("deepseek-v3")
    only = r"self_attn\.(q_a|q_b|o)_proj|self_attn\.kv_a|layers\.0\.mlp|shared_experts"
    written = {name: adapters_by_hand.write(tmp_path / name, path, seed, only=only) for seed, name in enumerate("abcd")}
    merged = [adapters_by_hand.merge(path, directory, tmp_path / f"merged-{name}")
              for name, directory in written.items()]
    assert_merged([*merged, path], generate(path, written))


def test_an_engine_with_slots_and_without_adapters(family: Callable[[str], Path]) -> None:
    """Nothing of a step changes: the input has no field of adapters, and the logprobs are equal to the last bit."""
    found = []
    for slots in (0, 3):
        with LLM(str(family("llama")), device="cpu", dtype="float32", max_adapters=slots) as llm:
            found.append([o.logprobs for o in families.generate(llm, ROUTE, 6)])
            assert llm.executor._worker.model_input.adapter_slots is None  # type: ignore[attr-defined]
    assert found[0] == found[1]
