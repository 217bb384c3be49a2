"""Weight schemes of a third party: a checkpoint in its format runs on the default operations, however it is sharded."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # `other_formats`

from other_formats import Groups4, Rows8, packed

from hal import LLM, SamplingParams
from hal.checkpoints import loader
from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights, random_weights
from hal.checkpoints.stored import Stored
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError, ModelLoadError, SchemaError, WireError
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.layers import Linear, Unmerged
from hal.models.ops import Ops
from hal.paged.runner import PagedModelRunner
from hal.recording.typed import typed
from hal.weights import Dim, LinearSpec, Projection, Scheme, WeightTensor
from hal.weights.formats import names, schemes
from hal.weights.sharding import shard
from runners.cpu.ops import CpuOps

HERE = Path(__file__).parent
Tensors = dict[str, torch.Tensor]
Checkpoint = Callable[[str], Path]
GROUP = 16
FORMATS = {"rows8": ("llama-linear-biases", {}), "groups4": ("qwen3", {"group_size": GROUP, "ignore": ["lm_head"]}),
           "act_order": ("qwen3", {"group_size": GROUP, "ignore": ["lm_head"], "act_order": True})}


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_WEIGHTS", "rows8=other_formats:rows8,groups4=other_formats:groups4")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))))


def to_rows8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The stored tensors of a dense weight, and the weight that they stand for."""
    scale = weight.abs().amax(1) / 127
    values = (weight / scale[:, None]).round().to(torch.int8)
    stored = {"weight": values, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return {f"{name}.{key}": value for key, value in stored.items()}, values.float() * scale[:, None]


def to_groups4(name: str, weight: torch.Tensor, act_order: bool) -> tuple[Tensors, torch.Tensor]:
    """With `act_order`, inputs belong to groups in an order that differs from projection to projection."""
    inputs = weight.shape[1]
    group = torch.arange(inputs, dtype=torch.int32) // GROUP
    if act_order:
        group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(len(name) + ord(name[-6])))]
    count = inputs // GROUP
    parts = [weight[:, group == g] for g in range(count)]
    low, high = (torch.stack([getattr(p, what)(1) for p in parts]) for what in ("amin", "amax"))
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    values = (weight.t() / scales.float()[group] + zeros[group]).round().clamp(0, 15)
    stored = {"qweight": packed(values, 0), "scales": scales, "qzeros": packed(zeros, 1)}
    if act_order:
        stored["g_idx"] = group
    return {f"{name}.{key}": value for key, value in stored.items()}, (
        (values - zeros[group]) * scales.float()[group]).t()


@pytest.fixture(scope="module", params=list(FORMATS))
def quantised(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory,
              ) -> tuple[Path, Path]:
    """A checkpoint in a format, and a dense one of the same values."""
    source, options = FORMATS[request.param]
    paths = [tmp_path_factory.mktemp("weights") / kind for kind in (request.param, "dense")]
    for path in paths:
        shutil.copytree(checkpoint(source), path)
    tensors = load_file(checkpoint(source) / "model.safetensors")
    stored, dense = dict(tensors), dict(tensors)
    for key, weight in tensors.items():
        name = key.removesuffix(".weight")
        if name.endswith("_proj") or (name == "lm_head" and request.param == "rows8"):
            found, dense[key] = (to_rows8(name, weight) if request.param == "rows8" else
                                 to_groups4(name, weight, request.param == "act_order"))
            del stored[key]
            stored |= found
    config = json.loads((paths[0] / "config.json").read_text())
    method = request.param if request.param == "rows8" else "groups4"
    config["quantization_config"] = {"quant_method": method, **options}
    (paths[0] / "config.json").write_text(json.dumps(config))
    for path, content in zip(paths, (stored, dense), strict=True):
        save_file({k: v.contiguous() for k, v in content.items()}, path / "model.safetensors", {"format": "pt"})
    return paths[0], paths[1]


@pytest.mark.slow
@pytest.mark.parametrize("quantised", ["rows8"], indirect=True)
def test_tokens_are_those_of_a_plain_forward_pass_over_dequantised_weights(quantised: tuple[Path, Path]) -> None:
    path, dense = quantised
    model, prompts = checkpoints.load(dense), checkpoints.prompts(3)
    expected = []
    for prompt in prompts:
        tokens, leads = checkpoints.greedy(model, prompt, 12)
        assert min(leads) > 1e-3
        expected.append(tokens)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        with LLM(model=path, device="cpu", dtype="float32", tp=tp, pp=pp, max_model_len=128, num_blocks=64) as llm:
            assert [output.token_ids for output in llm.generate(prompts, params)] == expected, (tp, pp)


def build(path: Path, topology: Topology | None = None, ops: Ops | None = None) -> CausalLM:
    return build_model(read_config(path), topology or Topology(), LocalCommunicator(), ops or Ops(), torch.float32,
                       torch.device("cpu"))


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_hold_their_part_of_every_weight(quantised: tuple[Path, Path], tp: int) -> None:
    """What a rank's layer stands for is what the same rank has of the dense checkpoint."""
    path, dense = quantised
    for rank in range(tp):
        ours, theirs = build(path, Topology(tp, 1, rank)), build(dense, Topology(tp, 1, rank))
        load_weights(ours, path)
        load_weights(theirs, dense)
        plain = dict(theirs.named_modules())
        for name, layer in ours.named_modules():
            if isinstance(layer, Linear):
                torch.testing.assert_close(layer.scheme.dequantize(layer), plain[name].weight, rtol=0, atol=1e-6)


def test_random_weights_are_usable(quantised: tuple[Path, Path]) -> None:
    model = build(quantised[0])
    random_weights(model)
    for layer in model.modules():
        if isinstance(layer, Linear):
            assert layer.scheme.dequantize(layer).isfinite().all()


def test_a_device_that_cannot_multiply_refuses_before_memory_is_taken(quantised: tuple[Path, Path]) -> None:
    class OwnLinear(Ops):
        def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
            return x @ layer.weight.t()

    class Declared(OwnLinear):
        schemes = ("dense", "rows8", "groups4")

    path, dense = quantised
    name = read_config(path).quantization["quant_method"]  # type: ignore[index]
    with pytest.raises(ConfigError, match=rf"(?s){name}.*got: (lm_head|layers\.0\.self_attn\.q_proj)\n.*"
                       "OwnLinear: dense\n.*the cpu"):
        build(path, ops=OwnLinear())
    build(dense, ops=OwnLinear())
    build(path, ops=Declared())


@pytest.mark.parametrize("quantised", ["rows8"], indirect=True)
def test_the_shares_of_an_xla_mesh_are_dense(quantised: tuple[Path, Path]) -> None:
    """There one layer holds the tensors of all ranks, for which a scheme's arithmetic is not written."""
    from runners.tpu.spmd import TpuOps

    with pytest.raises(ConfigError, match=r"(?s)rows8.*TpuOps: dense"):
        build(quantised[0], Topology(2), TpuOps(2))
    build(quantised[0], ops=TpuOps(1))
    build(quantised[0], ops=CpuOps())


@pytest.fixture
def edited(quantised: tuple[Path, Path], tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    def make(edit: Callable[[Tensors], object]) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(quantised[0], path)
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")
        return path

    return make


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("quantised", "edit", "named"), [
    ("rows8", lambda t: t.pop(f"{UP}.weight_scale"), "lacks the tensor 'layers.1.mlp.up_proj.weight_scale'"),
    ("rows8", lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"][1:]}), "has the wrong shape"),
    ("rows8", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}), "(?s)unsupported dtype.*F32.*I8"),
    ("rows8", lambda t: t[f"{UP}.weight_scale"].fill_(float("nan")), "not finite"),
    ("groups4", lambda t: t.update({f"{UP}.g_idx": torch.zeros(64)}), "does not use"),
    ("groups4", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].t().contiguous()}), "has the wrong shape"),
    ("act_order", lambda t: t[f"{UP}.g_idx"].add_(1), "(?s)g_idx.*out of range.*from 0 to 3"),
], indirect=["quantised"], ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_tensors_are_refused(edited: Callable[..., Path], edit: Callable[[Tensors], object], named: str) -> None:
    path = edited(edit)
    with pytest.raises(ModelLoadError, match=named):
        load_weights(build(path), path)


def linear(sharded: str, *sizes: int, in_size: int = 64, heads: int | None = None) -> LinearSpec:
    projections = tuple(Projection(f"p{i}", size, heads) for i, size in enumerate(sizes))
    return LinearSpec(in_size, projections, sharded)  # type: ignore[arg-type]


def shapes(scheme: Scheme, spec: LinearSpec, tp: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Of each tensor, a rank's shape and the dimension that is sharded."""
    found = {}
    for tensor in scheme.tensors(spec):
        shape, declared = shard(spec, tensor, scheme.name, Topology(tp))
        found[tensor.name] = shape, declared.sharded
    return found


def test_shapes_and_sharded_dimensions_follow_from_the_declaration() -> None:
    column, row = linear("out", 64, 32), linear("in", 48)
    assert shapes(Rows8(), column, 2) == {"weight": ((48, 64), 0), "weight_scale": ((48,), 0)}
    assert shapes(Rows8(), row, 2) == {"weight": ((48, 32), 1), "weight_scale": ((48,), None)}
    assert shapes(Groups4(16), column, 2) == {"qweight": ((8, 48), 1), "scales": ((4, 48), 1), "qzeros": ((4, 6), 1)}
    assert shapes(Groups4(16), row, 2) == {"qweight": ((4, 48), 0), "scales": ((2, 48), 0), "qzeros": ((2, 6), 0)}
    assert shapes(Groups4(16, True), column, 2) == {
        "qweight": ((8, 48), 1), "scales": ((4, 48), 1), "qzeros": ((4, 6), 1), "g_idx": ((2, 64), None)}
    assert shapes(Groups4(16, True), row, 2) == {  # any input may be of any group
        "qweight": ((4, 48), 0), "scales": ((4, 48), None), "qzeros": ((4, 6), None), "g_idx": ((1, 32), 1)}


@pytest.mark.parametrize(("sharded", "tensor", "tp", "shape", "stored", "ranges"), [
    # One scale for each stored tensor, which lacks the dimension.
    ("out", WeightTensor("s", (Dim("part"),)), 2, (2,), (), ((0, 1), (0, 1))),
    # Blocks of 32 x 48, the last one short.
    ("out", WeightTensor("s", (Dim("out", per=32), Dim("in", per=48))), 1, (3, 2), (2, 2), ((0, 2), (0, 1))),
    # 16 bytes for 8 inputs, whose boundary is that of ranks too.
    ("in", WeightTensor("s", (Dim("out"), Dim("in", per=8, holds=16))), 2, (64, 64), (64, 128), ((64, 128),)),
    ("in", WeightTensor("s", (Dim("out"), Dim("in", per=32), 16), "uint8"), 2, (64, 1, 16), (64, 2, 16), ((1, 2),)),
])
def test_other_layouts(sharded: str, tensor: WeightTensor, tp: int, shape: tuple[int, ...], stored: tuple[int, ...],
                       ranges: tuple[tuple[int, int], ...]) -> None:
    """What formats of blocks need: of the second rank where there are two."""
    spec = linear(sharded, 64, 32) if sharded == "out" else linear(sharded, 64)
    topology = Topology(tp, 1, tp - 1)
    found, declared = shard(spec, tensor, "blocks", topology)
    assert found == shape and declared.sources[0].shape == stored
    assert tuple(source.local(topology.axis("tp")) for source in declared.sources) == ranges


@pytest.mark.parametrize(("spec", "tp", "named"), [
    (linear("in", 48, in_size=96), 4, r"(?s)tp=4 cuts a group.*'groups4'.*24 inputs of p0.*multiple of 16.*'scales'.*"
                                      r"below is 3"),
    (linear("in", 48, in_size=144), 8, r"(?s)tp=8.*18 inputs of p0.*multiple of 8.*'qweight'.*below is 6"),
    (linear("out", 48), 4, r"(?s)tp=4.*12 outputs of p0.*multiple of 8.*'qzeros'.*below is 3"),
    (linear("out", 36, 64), 1, r"(?s)merging.*'groups4'.*36 outputs of p0.*multiples of 8.*'qzeros'"),
])
def test_a_group_is_never_cut(spec: LinearSpec, tp: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        shapes(Groups4(16), spec, tp)


def test_ranks_share_scales_as_they_share_heads() -> None:
    spec = linear("out", 32, heads=2)
    _, declared = shard(spec, Rows8().tensors(spec)[1], "rows8", Topology(4))
    ranges = [declared.sources[0].local(Topology(4, 1, r).axis("tp")) for r in range(4)]
    assert ranges == [(0, 16), (0, 16), (16, 32), (16, 32)]


@pytest.mark.parametrize("make", [
    lambda: WeightTensor("x", (Dim("in"),)), lambda: WeightTensor("x", (Dim("out"), Dim("part"))),
    lambda: WeightTensor("x", (Dim("part"), Dim("in")), transposed=True), lambda: Dim("out", replicated=True),
    lambda: Dim("in", per=0), lambda: Dim("part", per=2)])
def test_meaningless_declarations_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(SchemaError):
        make()


def test_formats_by_name(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"rows8", "groups4"} <= set(names())
    assert schemes(None)("x").name == "dense" and schemes({"quant_method": "rows8"})("x").name == "rows8"
    monkeypatch.setenv("HAL_WEIGHTS", "gone=no_such_module:f,wrong=other_formats:missing")
    for name in ("gone", "wrong"):
        with pytest.raises(ConfigError, match=rf"(?s){name}.*HAL_WEIGHTS"):
            schemes({"quant_method": name})
    monkeypatch.setenv("HAL_WEIGHTS", "rows8")
    with pytest.raises(ConfigError, match="quant_method=module:function"):
        names()
    monkeypatch.setenv("HAL_WEIGHTS", "a=b:c")
    for got in ("rows8", 3, None):
        with pytest.raises(ModelLoadError, match=rf"(?s)unknown format.*{got!r}.*expected: a, auto-round, awq, comp"):
            schemes({"quant_method": got})


def test_projections_of_different_schemes_stay_apart(quantised: tuple[Path, Path]) -> None:
    config = read_config(quantised[0])
    quantization: dict[str, Any] = {"quant_method": "groups4", "group_size": GROUP, "ignore": ["layers.0.mlp.up_proj"]}
    config = dataclasses.replace(config, quantization=quantization)
    model = build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("meta"))
    apart, merged = (model.get_submodule(f"layers.{i}.mlp.gate_up") for i in range(2))
    assert isinstance(apart, Unmerged) and isinstance(merged, Linear)
    assert [layer.scheme.name for layer in apart.layers] == ["groups4", "dense"]  # type: ignore[union-attr]


@pytest.mark.parametrize("quantised", ["rows8"], indirect=True)
def test_a_load_checks_each_tensor_once(quantised: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen, check = quantised[0], [], loader._check_tensor

    def counted(wanted: Any, stored: Stored, file: Any) -> None:
        seen.append(stored.name)
        check(wanted, stored, file)

    monkeypatch.setattr(loader, "_check_tensor", counted)
    config = WorkerConfig(EngineConfig(model=str(path), device="cpu"), read_config(path), Topology())
    PagedModelRunner(config, torch.device("cpu"), LocalCommunicator()).load_model()
    assert sorted(seen) == sorted(name for name in load_file(path / "model.safetensors") if "weight_shape" not in name)


def test_a_configuration_of_quantised_weights_travels_as_json(quantised: tuple[Path, Path]) -> None:
    """To other ranks, and in the head of a recording."""
    model = read_config(quantised[0])
    config = WorkerConfig(EngineConfig(model=str(quantised[0]), device="cpu"), model, Topology())
    assert WorkerConfig.from_json(config.to_json()).model == model
    head = json.loads(json.dumps(dataclasses.asdict(model)))
    assert typed(ModelConfig, head, "model").quantization == model.quantization
    with pytest.raises(WireError, match="quantization"):
        typed(ModelConfig, {**head, "quantization": ["rows8"]}, "model")
