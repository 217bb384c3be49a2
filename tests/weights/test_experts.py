"""Experts of a mixture in few bits, against the dequantised model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # `published` and `test_published`

import published
from published import FORMATS
from test_published import build, far, loaded

from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights
from hal.config import EngineConfig, Topology
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError, ModelLoadError
from hal.models import build_model
from hal.models.experts import Experts
from hal.models.floors import bytes_per_step
from hal.models.memory import memory_line, weight_bytes
from hal.models.ops import Ops
from hal.weights.configs import ON_LOAD

SIZE = 64  # of an expert's inner layer
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=SIZE, head_dim=16,
                                    num_hidden_layers=2, intermediate_size=64)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2,
                                intermediate_size=SIZE)),
    "gpt-oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2, head_dim=16,
                                intermediate_size=SIZE)),
}
CUTTABLE = [name for name in FORMATS if name != "fp8-blocks-across"]
Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def save(name: str, directory: Path) -> Path:
        kind, options = SHAPES[name]
        return checkpoints.save_model(kind, {**families.SHAPE, **options}, directory)

    return checkpoints.made_once(save, tmp_path_factory)


@pytest.fixture(scope="module")
def made(plain: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return published.made_once(plain("qwen3-moe"), tmp_path_factory)


def mixture(model: Any, layer: int = 0) -> Experts:
    found = model.layers[layer].mlp
    assert isinstance(found, Experts)
    return found


@pytest.mark.parametrize("name", ["int4-packed-act-order", "gptq", "awq", "mxfp4"])
def test_log_probabilities_are_those_of_the_dequantised_model(made: Made, name: str) -> None:
    """Of formats that keep the inputs of layers exact: rounded inputs may choose other experts."""
    path, dense = made(name)
    assert far(path, dense) < FORMATS[name][2]


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_computes_with_the_dequantised_weights(made: Made, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens in groups by expert, as on the CPU, and every expert for every token, as on devices with graphs."""
    monkeypatch.setattr("hal.models.expert_weights._VALUES", 3 * SIZE * (64 + 5) * 2)  # not all experts at once
    path, dense = made(name)
    layer, whole = mixture(loaded(path)), mixture(loaded(dense))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) / 10  # static scales of inputs reach to 22
    weights, chosen = Ops().route(x, layer)
    got, expected = (Ops().experts(x, weights, chosen, each) for each in (layer, whole))
    rounds = 0.3 if "static" in name else 0.06 if "fp8" in name else 0.02 if name == "int8-channel" else 1e-5
    assert (got - expected).norm() < rounds * expected.norm()
    share = torch.zeros(5, 4).scatter_add(1, chosen, weights).t().unsqueeze(-1)
    torch.testing.assert_close(layer.compute_every(x, share), got, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUTTABLE)
def test_ranks_hold_their_part_of_their_experts(made: Made, name: str) -> None:
    path, dense = made(name)
    for topology in (Topology(2, 1, 1), Topology(2, 1, 1, 2), Topology(2, 1, 0, 1)):
        ours, whole = mixture(loaded(path, topology)), mixture(loaded(dense, topology))
        assert ours.few_bits and not whole.few_bits
        ours.decode()
        torch.testing.assert_close(ours.gate_up, whole.gate_up, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.down, whole.down, rtol=1e-6, atol=1e-6)


def test_gate_and_up_may_differ(plain: Callable[[str], Path], tmp_path: Path) -> None:
    """up is in GPTQ, and gate is dense; then both are in groups that differ."""
    config, writer, tolerance = FORMATS["gptq-act-order"]
    paths = published.write(plain("qwen3-moe"), tmp_path / "a", {**config, "dynamic": {"-:.*gate_proj": {}}}, writer,
                            ("lm_head", "gate_proj"))
    assert far(*paths) < tolerance
    layer = mixture(loaded(paths[0]))
    assert [w.scheme.name for w in layer.layers] == ["dense", "gptq", "gptq"]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    share = torch.rand(4, 5, 1, generator=torch.Generator().manual_seed(1))
    every = sum(share[i] * layer.compute_one(x, i) for i in range(4))
    torch.testing.assert_close(layer.compute_every(x, share), every, rtol=1e-4, atol=1e-5)


def test_names_of_mixtral(plain: Callable[[str], Path], tmp_path: Path) -> None:
    """Its parts are w1, w3 and w2, so the writer gets a checkpoint whose attention is quantised alone, and the
    experts' weights after that."""
    config, writer, tolerance = FORMATS["int4-packed-zeros"]
    path, dense = published.write(plain("mixtral"), tmp_path, config, writer)
    tensors, whole = load_file(path / "model.safetensors"), load_file(dense / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("w1.weight", "w2.weight", "w3.weight"))]:
        name = key.removesuffix(".weight")
        parts, whole[key] = writer(tensors.pop(key), name)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    for where, content in ((path, tensors), (dense, whole)):
        save_file({k: v.contiguous() for k, v in content.items()}, where / "model.safetensors", {"format": "pt"})
    assert far(path, dense) < tolerance


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("scheme", ON_LOAD)
def test_experts_lose_bits_on_load(plain: Callable[[str], Path], name: str, scheme: str) -> None:
    path = plain(name)
    steps = {"fp8": 1 / 16, "int8": 1 / 254, "int4": 1.6 / 15}  # steps over the largest value
    for topology in (Topology(), Topology(2, 1, 1, 2)) if scheme != "int4" else (Topology(),):  # a group is 64 inputs
        ours, whole = mixture(loaded(path, topology, quantize=scheme)), mixture(loaded(path, topology))
        assert all(w.scheme is ON_LOAD[scheme] for w in ours.layers)
        ours.decode()
        for got, dense in ((ours.gate_up, whole.gate_up), (ours.down, whole.down)):
            largest = dense.abs().amax(-1, keepdim=True)
            assert ((got - dense).abs() <= steps[scheme] * largest + 1e-6).all()
            assert (got != dense).any()


def test_tp_never_cuts_a_group_of_an_expert(made: Made, plain: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)tp=2 cuts.*'fp8-block'.*24.*below is 1"):
        build(made("fp8-blocks-across")[0], Topology(2))
    config = read_config(made("gptq")[0])
    heads = dict(num_heads=8, num_kv_heads=8, quantization={**FORMATS["gptq"][0], "dynamic": {"-:.*self_attn": {}}})
    for topology, ranks in ((Topology(8, 1, 0), (8, 4)), (Topology(16, 1, 0, 2), (16, 8))):
        wide = type(config)(**{**{f: getattr(config, f) for f in config.__dataclass_fields__}, **heads,
                               "num_heads": 16, "num_kv_heads": 16})
        with pytest.raises(ConfigError, match=rf"(?s)tp={ranks[0]} cuts.*'gptq'.*8 inputs of layers.0.mlp.experts."
                                              rf"\d.down_proj.*below is {ranks[1]}$"):
            build_model(wide, topology, LocalCommunicator(), Ops(), torch.float32, torch.device("meta"))


@pytest.mark.parametrize(("edit", "named"), [
    (lambda t, name: t.pop(f"{name}.weight_scale"), "lacks the tensor 'layers.1.mlp.experts.3.down_proj.weight_scale'"),
    (lambda t, name: t.update({f"{name}.weight_scale": t[f"{name}.weight_scale"][:, :-1].contiguous()}),
     r"(?s)experts.3.down_proj.weight_scale.*wrong shape.*\[64, 3\].*\[64, 4\]"),
    (lambda t, name: t[f"{name}.weight_scale"].fill_(float("nan")), "experts.3.down_proj.weight_scale.*not finite"),
    (lambda t, name: t.update({f"{name}.qweight": t[f"{name}.weight_packed"].clone()}), "does not use"),
])
def test_wrong_tensors_of_an_expert_are_refused(made: Made, tmp_path: Path, edit: Callable[..., object], named: str,
                                                ) -> None:
    source = made("int4-packed")[0]
    tensors = load_file(source / "model.safetensors")
    edit(tensors, "model.layers.1.mlp.experts.3.down_proj")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ModelLoadError, match=named):
        loaded(tmp_path)


def test_the_memory_of_experts(made: Made) -> None:
    config = read_config(made("int4-packed")[0])
    held = weight_bytes(config, "bfloat16", Topology(2, 1, 0, 2))
    of_experts = 2 * 2 * 3 * SIZE * 64  # values: layers, experts of a rank, gate and up and down
    assert held["experts int4-groups"] == (4, of_experts // 2 + of_experts // published.GROUP * 4)
    assert "experts int4-groups 0.1 in 4 layers" in memory_line(EngineConfig(), config, "bfloat16")
    dense = read_config(made("int4-packed")[1])
    one, all_ = (bytes_per_step(config, "bfloat16", "auto", batch, 1) for batch in (1, 10_000))
    kv = bytes_per_step(dense, "bfloat16", "auto", 2, 1) - bytes_per_step(dense, "bfloat16", "auto", 1, 1)
    assert kv > 0 and one < all_
    whole = weight_bytes(config, "bfloat16")["experts int4-groups"].bytes
    head = 2 * config.vocab_size * 64
    others = sum(h.bytes for h in weight_bytes(config, "bfloat16").values()) - whole
    assert one == pytest.approx(others + whole / 2 - head + 2 * 64 + 2 * config.kv_entries * 2)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_experts_on_the_kernels_of_the_cpu(plain: Callable[[str], Path], scheme: str) -> None:
    """They read values as they are stored, of one expert as of a linear layer."""
    from runners.cpu.ops import CpuOps

    config = read_config(plain("gpt-oss"), quantize=scheme)
    plainly, ops = Ops(), CpuOps()
    if not ops.kernels:
        pytest.skip("the CPU's kernels are not compiled here")
    layers = []
    for each in (plainly, ops):
        model = build_model(config, Topology(), LocalCommunicator(), each, torch.bfloat16, torch.device("cpu"))
        load_weights(model, plain("gpt-oss"))
        layers.append(mixture(model))
    assert not list(layers[1].layers[0].parameters()) and list(layers[0].layers[0].parameters())
    assert f"4 by {scheme} kernel, of experts" in ops.described()
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, chosen = plainly.route(x, layers[0])
    expected, got = (each.experts(x, weights, chosen, layer).float() for each, layer in zip((plainly, ops), layers,
                                                                                            strict=True))
    assert (got - expected).norm() < 0.02 * expected.norm()
