"""Every native family through the whole stack against transformers in fp64."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights
from hal.config import Topology
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError
from hal.models import build_model, check_topology, ops
from hal.models.ops import Ops

SWAP: dict[str, Any] = {"num_blocks": 41, "max_model_len": 128, "num_cpu_blocks": 64}
Family = Callable[[str], Path]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return checkpoints.made_once(families.save, tmp_path_factory)


def prompts(name: str) -> list[list[int]]:
    return families.LONG if "longrope" in name else families.PROMPTS


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("gemma2", "qwen3-next") else pytest.mark.slow)
                                  for name in families.FAMILIES])
def test_chunked_preempted_and_with_a_cached_prefix(family: Family, name: str) -> None:
    """One engine does it all: prompts in chunks of at most 13 tokens, sequences that outgrow the blocks, and a second
    request whose prompt and first tokens are cached."""
    asked = prompts(name)
    with families.run(family(name), max_num_batched_tokens=13, num_blocks=41, max_model_len=128) as llm:
        outputs = families.generate(llm, asked)
        families.assert_parity(family(name), asked, outputs)
        again = [asked[0] + outputs[0].token_ids[:20]]
        before = llm.stats().cached_tokens
        families.assert_parity(family(name), again, families.generate(llm, again, 8))
        stats = llm.stats()
    assert stats.preemptions > 0
    assert stats.cached_tokens == 0 if name in families.HYBRIDS else stats.cached_tokens > before


def test_experts_that_the_ranks_cannot_share_are_refused(family: Family) -> None:
    config = read_config(family("qwen3-moe"))
    check_topology(config, Topology(tp=2, ep=2))
    shared = dataclasses.replace(config, experts=dataclasses.replace(config.experts, shared_size=41))
    with pytest.raises(ConfigError, match=r"cannot share the model's experts"):
        check_topology(shared, Topology(tp=2, ep=2))
    for tp, ep in ((4, 4), (4, 1)):
        model = config if ep == 4 else dataclasses.replace(config, experts=dataclasses.replace(config.experts, size=42))
        with pytest.raises(ConfigError, match=r"cannot share the model's experts"):
            check_topology(model, Topology(tp=tp, ep=ep))


def test_experts_in_mxfp4_are_decoded_as_transformers_decodes_them(tmp_path: Path) -> None:
    """A published gpt-oss checkpoint stores its experts so; each rank gets its part."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dense = checkpoints.save_model("gpt_oss", {**families.SHAPE, **families.FAMILIES["gpt-oss"][1],
                                               "intermediate_size": 64}, tmp_path / "dense")
    shutil.copytree(dense, tmp_path / "packed")
    tensors, generator = load_file(dense / "model.safetensors"), torch.Generator().manual_seed(0)
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors[name].shape
        blocks, scales = (torch.randint(low, high, (experts, outer, inner // 32, *more), generator=generator).byte()
                          for low, high, more in ((0, 256, (16,)), (118, 130, ())))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        del packed[name]
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    save_file(packed, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**config, "quantization_config": {
        "quant_method": "mxfp4"}}))
    for topology in (Topology(), Topology(tp=2, rank=1), Topology(tp=2, ep=2, rank=1)):
        expected, got = (build_model(read_config(path), topology, LocalCommunicator(), Ops(), torch.float32,
                                     torch.device("cpu")) for path in (dense, tmp_path / "packed"))
        for model, path in ((expected, dense), (got, tmp_path / "packed")):
            load_weights(model, path)
        held = dict(got.named_parameters())
        assert held["layers.0.mlp.layers.0.blocks"].dtype == torch.uint8
        for layer in got.layers:
            layer.mlp.decode()
        for name, parameter in expected.named_parameters():
            assert torch.equal(got.get_parameter(name), parameter), name
    with pytest.raises(ConfigError, match=r"(?s)tp=4 cuts a group.*'mxfp4'.*largest below is 2"):
        build_model(read_config(tmp_path / "packed"), Topology(tp=4), LocalCommunicator(), Ops(), torch.float32,
                    torch.device("meta"))


@pytest.mark.parametrize("layout", [{}, pytest.param({"tp": 2, "ep": 2}, marks=pytest.mark.slow)], ids=str)
def test_loads_of_experts_are_those_of_transformers(family: Family, layout: dict[str, Any]) -> None:
    """In the steps of an engine, without those of its warm-up and without padding."""
    path, prompt = family("qwen3-moe"), families.PROMPTS[0]
    with families.run(path, expert_loads=True, max_num_batched_tokens=13, **layout) as llm:
        before = llm.stats()
        tokens = families.generate(llm, [prompt], 8)[0].token_ids
        stats = llm.stats()
    assert before.expert_loads is not None and not before.expert_loads.any() and before.expert_imbalance is None
    model, expected = checkpoints.load(path), list[torch.Tensor]()
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda module, args, out: expected.append(
                out[2].flatten().bincount(minlength=6)))
    model(input_ids=torch.tensor([prompt + tokens[:-1]]), use_cache=False)
    loads = torch.stack(expected).numpy()
    assert (stats.expert_loads == loads).all() and loads.sum() == 3 * 3 * (len(prompt) + 7)
    assert stats.expert_imbalance == pytest.approx((loads.max(1) * 6 / loads.sum(1)).mean())


def test_loads_that_nobody_can_count_are_refused(family: Family) -> None:
    with pytest.raises(ConfigError, match=r"(?s)counts the experts of a native model.*Glm4ForCausalLM on cpu"):
        families.run(family("glm4"), expert_loads=True)
    with pytest.raises(ConfigError, match=r"(?s)the driver's stage.*pp=2"):
        families.run(family("qwen3-moe"), expert_loads=True, pp=2)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_every_expert_for_every_token_gives_the_same(family: Family, monkeypatch: pytest.MonkeyPatch, name: str,
                                                     ) -> None:
    """The product of static shapes that devices with graphs use, beside the one that is grouped by expert."""
    config = read_config(family(name))
    model = build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("cpu"))
    load_weights(model, family(name))
    layer = model.layers[0].mlp

    monkeypatch.setattr(ops, "_EXPERT_VALUES", 9 * (80 + 64) * 2)  # two experts at once

    class Elsewhere(torch.Tensor):
        is_cpu = False

    x = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    weights, chosen = F.linear(x, layer.router).softmax(-1).topk(3, -1)
    for layer.first, layer.count in ((0, 6), (2, 3)):
        layer.gate_up = torch.nn.Parameter(model.layers[0].mlp.gate_up[:2 * layer.count * layer.size])
        layer.down = torch.nn.Parameter(model.layers[0].mlp.down[:layer.count])
        if layer.gate_up_bias is not None:
            layer.gate_up_bias = torch.nn.Parameter(layer.gate_up_bias[:2 * layer.count * layer.size])
            layer.down_bias = torch.nn.Parameter(layer.down_bias[:layer.count * config.hidden_size])
        grouped = Ops().experts(x, weights, chosen, layer)
        static = Ops().experts(x.as_subclass(Elsewhere), weights, chosen, layer)
        torch.testing.assert_close(static.as_subclass(torch.Tensor), grouped)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "names"), [
    ({"tp": 2}, ("phi3", "olmo2", "gpt-oss")), ({"pp": 2}, ("gemma3", "deepseek-v2")),
    ({"tp": 2, "ep": 2}, ("qwen2-moe", "deepseek-v3")), ({"tp": 2, **SWAP}, ("qwen3-next", "qwen3.5")),
    ({"pp": 2, **SWAP}, ("qwen3-next",))], ids=["tp2", "pp2", "ep2", "tp2, states", "pp2, states"])
def test_in_processes(family: Family, layout: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        with families.run(family(name), max_num_batched_tokens=13, **layout) as llm:
            families.assert_parity(family(name), prompts(name), families.generate(llm, prompts(name)))
            assert bool(llm.stats().preemptions) == ("num_cpu_blocks" in layout)
