"""Checkpoints in the layouts that people download, against the dequantised model in transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # `published`

import published
from published import FORMATS, Tensors

from hal import LLM, SamplingParams
from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights
from hal.config import EngineConfig, Topology
from hal.contracts.attention import ForwardContext
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError, ModelLoadError
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.layers import Linear, Unmerged
from hal.models.memory import memory_line, weight_bytes
from hal.models.ops import Ops
from hal.weights.configs import ON_LOAD
from hal.weights.eight_bits import EightBits
from hal.weights.formats import schemes
from hal.weights.grid import Inputs, rounded
from hal.weights.groups import Gptq

PROMPTS = checkpoints.prompts(2)


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory,
         ) -> Callable[[str], tuple[Path, Path]]:
    return published.made_once(checkpoint("qwen3"), tmp_path_factory)


def build(path: Path, topology: Topology | None = None, **options: Any) -> CausalLM:
    return build_model(read_config(path, **options), topology or Topology(), LocalCommunicator(), Ops(), torch.float32,
                       torch.device("cpu"))


def forward(model: CausalLM, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [n, vocab] of a prompt, with an attention that keeps nothing."""
    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec = model.attention_specs[layer]
        heads = (x.transpose(0, 1) for x in (q, k.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1),
                                             v.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)))
        found = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=spec.scale)
        return found.transpose(0, 1).flatten(1)

    with torch.inference_mode():
        context = ForwardContext(attend, None)  # type: ignore[arg-type]
        hidden = model(torch.tensor(ids, dtype=torch.int32), torch.arange(len(ids), dtype=torch.int32), context, None)
        return model.compute_logits(hidden).float().log_softmax(-1)  # type: ignore[arg-type]


def loaded(path: Path, topology: Topology | None = None, **options: Any) -> CausalLM:
    model = build(path, topology, **options)
    load_weights(model, path)
    return model


def far(path: Path, dense: Path, **options: Any) -> float:
    model, plain = loaded(path, **options), loaded(dense)
    return max(float((forward(model, p) - forward(plain, p)).abs().max()) for p in PROMPTS)


@pytest.mark.parametrize("name", FORMATS)
def test_log_probabilities_are_those_of_the_dequantised_model(made: Any, name: str) -> None:
    """The tolerance is of the format: it is larger where the format rounds the inputs of layers."""
    path, dense = made(name)
    assert far(path, dense) < FORMATS[name][2]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("fp8-blocks-across", "mxfp4")])
def test_ranks_hold_their_part(made: Any, name: str) -> None:
    path, dense = made(name)
    for rank in range(2):
        ours = loaded(path, Topology(2, 1, rank))
        plain = dict(loaded(dense, Topology(2, 1, rank)).named_modules())
        for layer, module in ours.named_modules():
            if isinstance(module, Unmerged):
                got = torch.cat([part.scheme.dequantize(part) for part in module.layers])  # type: ignore[operator, union-attr]
            elif isinstance(module, Linear) and layer in plain:
                got = module.scheme.dequantize(module)
            else:
                continue
            torch.testing.assert_close(got, plain[layer].weight, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_engines_of_two_ranks(made: Any, tp: int, pp: int) -> None:
    path, dense = made("gptq-act-order")
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "num_blocks": 32}
    with LLM(path, tp=tp, pp=pp, **options) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True))
    model = checkpoints.load(dense)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        wanted = checkpoints.logprobs(model, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        ours = torch.tensor([entry.logprob for entry in (output.prompt_logprobs or [])[1:] if entry is not None])
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-4)


def test_static_scales_round_the_inputs_of_their_own_projection(made: Any) -> None:
    """q, k and v are merged, and each has a scale of its own."""
    layer = loaded(made("fp8-tensor-static")[0]).layers[0].attention.qkv  # type: ignore[union-attr]
    layer.get_parameter("input_scale").data.copy_(torch.tensor([0.01, 0.1, 0.02]))
    x = torch.randn(5, layer.in_size, generator=torch.Generator().manual_seed(0))
    got = layer(x).split(layer.outputs, -1)
    for part, weight, scale in zip(got, layer.scheme.dequantize(layer).split(layer.outputs), (0.01, 0.1, 0.02),
                                   strict=True):
        inputs = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        torch.testing.assert_close(part, inputs @ weight.t(), rtol=1e-5, atol=1e-5)
    assert (got[0] - x @ layer.scheme.dequantize(layer)[:128].t()).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "dims"), [("token", -1), ("tensor", None), ("group", -1)])
def test_dynamic_scales_are_of_the_largest_input(kind: Inputs, dims: int | None) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [9.0], [0.0]])
    x[1, 35:] *= 50
    scheme = EightBits("fp8", "channel", kind, block=(16, 16))
    parts = x.split(16, 1) if kind == "group" else [x]
    wanted = []
    for part in parts:
        scale = (part.abs().amax(dims, keepdim=True) / 448).clamp(min=1e-12)
        wanted.append((part / scale).to(torch.float8_e4m3fn).float() * scale)
    torch.testing.assert_close(scheme.rounded(x), torch.cat(wanted, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["token", "tensor"])
def test_inputs_as_int8_span_the_whole_type(kind: Inputs) -> None:
    """As compressed-tensors rounds them: the largest input becomes 127.5, so that -128 is used too."""
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [9.0], [0.1]])
    scale = x.abs().amax(1 if kind == "token" else None, keepdim=True) / 127.5
    wanted = (x / scale).round().clamp(-128, 127) * scale
    torch.testing.assert_close(EightBits("int8", "channel", kind).rounded(x), wanted, rtol=1e-6, atol=0)
    assert rounded(torch.tensor([-2.0, 2.0]), torch.tensor(1 / 64), "int8").tolist() == [-2.0, 127 / 64]


def scheme_names(config: dict[str, Any], *names: str) -> list[str]:
    chosen = schemes(config)
    return [chosen(name).name for name in names]


@pytest.mark.parametrize(("config", "expected"), [
    ({**FORMATS["awq"][0], "modules_to_not_convert": ["mlp"]}, ["awq", "dense", "dense"]),
    ({**FORMATS["awq"][0], "modules_to_not_convert": ["model.layers.1"]}, ["awq", "dense", "dense"]),
    ({**FORMATS["awq"][0], "modules_to_not_convert": ["mlp.down", "layers.*.self_attn"]}, ["dense", "awq", "dense"]),
    ({**FORMATS["fp8-blocks"][0], "ignored_layers": ["model.layers.0.self_attn.q_proj"]},
     ["dense", "fp8-block", "dense"]),
    (published.compressed("int-quantized", {**published._CHANNEL8, "type": "int"}), ["int8-channel"] * 2 + ["dense"]),
    ({**FORMATS["int4-packed"][0], "ignore": ["re:.*down_proj$"]}, ["int4-groups", "dense", "int4-groups"]),
    ({**FORMATS["awq"][0], "zero_point": False, "modules_to_not_convert": ["lm_head"]}, ["awq", "awq", "dense"]),
    (published.auto_round("auto_round:auto_awq", extra_config={"model.layers.1.mlp.down_proj": {"bits": 16}}),
     ["awq", "dense", "dense"]),
    (published.auto_round("auto_round:auto_gptq", block_name_to_quantize=["model.layers.1"], extra_config={
        ".*down_proj": {"bits": 16}, "model.layers.1.mlp.down_proj": {"bits": 8}, "lm_head": {}}),
     ["dense", "gptq", "gptq"]),
    (published.auto_round("auto_round:auto_awq", block_name_to_quantize="model.layers.0, model.layers.1", extra_config={
        "model.layers.1.mlp.down": {"bits": 16}, "lm_head": {"bits": 16}}), ["awq", "awq", "dense"]),
    (published.compressed("dense", {}) | {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}, ["dense"] * 3),
    ({**FORMATS["gptq"][0], "lm_head": True, "dynamic": {"-:.*self_attn": {}}}, ["dense", "gptq", "gptq"]),
])
def test_ignored_layers_stay_dense(config: dict[str, Any], expected: list[str]) -> None:
    assert scheme_names(config, "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "lm_head") == expected


def test_layers_of_one_checkpoint_differ() -> None:
    config = {**FORMATS["int4-packed"][0]}
    eight = {"targets": ["re:.*layers\\.1\\..*", "model.layers.0.mlp.down_proj"], "format": "float-quantized",
             "weights": {**published._CHANNEL8, "type": "float"},
             "input_activations": {**published._TOKEN8, "type": "float"}}
    config["config_groups"] = {**config["config_groups"], "group_1": eight}
    assert scheme_names(config, "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"
                        ) == ["int4-groups", "fp8-channel", "fp8-channel"]
    rules = {**FORMATS["gptq"][0], "dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 32}}}
    found = schemes(rules)("layers.0.mlp.down_proj")
    assert isinstance(found, Gptq) and (found.bits, found.group) == (8, 32)


def test_a_checkpoint_whose_layers_differ_runs(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Gate and up have different schemes, and the output of attention is dense."""
    config, writer, tolerance = FORMATS["gptq"]
    paths = published.write(checkpoint("qwen3"), tmp_path, {
        **config, "dynamic": {"-:.*gate_proj": {}, "-:.*o_proj": {}}}, writer, ("gate_proj", "o_proj"))
    assert far(*paths) < tolerance


@pytest.mark.parametrize(("config", "named"), [
    ({"quant_method": "exl2"}, r"(?s)unknown format.*exl2.*awq, compressed-tensors, fp8, gguf, gptq, mxfp4"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 128}, r"(?s)number of bits.*got: 3.*4 or 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": "big"}, r"(?s)group_size.*'big'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, r"(?s)layout of GPTQ"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, r"(?s)layout of AWQ.*gemv"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, r"(?s)8 bits.*e5m2"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"(?s)weight_block_size.*\[128\]"),
    ({"quant_method": "fp8", "ignored_layers": "lm_head"}, r"(?s)ignored_layers.*lm_head"),
    ({"quant_method": "compressed-tensors"}, "config_groups"),
    (published.compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}), r"(?s)nvfp4.*pack-quantized \("),
    (published.compressed("int-quantized", {**published._CHANNEL8, "type": "int"}, {**published._TOKEN8,
                                                                                  "symmetric": False}), "inputs"),
    (published.compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
                          published._TOKEN8), r"(?s)pack-quantized with 4 bits.*input_activations given"),
    ({**FORMATS["int4-packed"][0], "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
     r"(?s)transforms of weights and activations.*hadamard"),
    (published.auto_round("auto_round:fp8"), r"(?s)layout of AutoRound.*auto_round:fp8.*auto_round:auto_gptq \("),
    (published.auto_round("auto_round:auto_gptq", act_bits=8), r"(?s)AutoRound.*act_bits=8.*not rounded"),
    (published.auto_round("auto_round:auto_awq", extra_config={"(": {}}), r"(?s)pattern of layers.*regular expression"),
    (published.auto_round("auto_round:auto_awq", extra_config={"lm_head": 5}), r"(?s)extra_config.*object of objects"),
    (published.auto_round("auto_round:auto_awq", act_bits="8"), r"(?s)act_bits.*8.*int"),
    ({**FORMATS["int4-packed"][0], "ignore": ["re:("]}, r"(?s)pattern of layers.*regular expression"),
])
def test_unknown_schemes_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelLoadError, match=named):
        schemes(config)("layers.0.mlp.down_proj")


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(("name", "edit", "named"), [
    ("fp8-blocks", lambda t: t.pop(f"{DOWN}.weight_scale_inv"), "lacks the tensor 'layers.1.mlp.down_proj.weight_sc"),
    ("fp8-blocks", lambda t: t.update({f"{DOWN}.weight_scale_inv": t[f"{DOWN}.weight_scale_inv"][:, :-1].contiguous()}),
     r"(?s)weight_scale_inv.*wrong shape.*\[4, 5\].*\[4, 6\]"),
    ("fp8-channel", lambda t: t[f"{DOWN}.weight_scale"].fill_(float("inf")), "weight_scale.*not finite"),
    ("int4-packed", lambda t: t.update({f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"].long()}), "(?s)I64.*I32"),
    ("gptq", lambda t: t.pop(f"{DOWN}.qzeros"), "lacks the tensor 'layers.1.mlp.down_proj.qzeros'"),
    ("gptq-act-order", lambda t: t[f"{DOWN}.g_idx"].add_(1), "(?s)g_idx.*out of range"),
    ("awq", lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"].t().contiguous()}), "wrong shape"),
    ("mxfp4", lambda t: t[f"{DOWN}.weight_scale"].fill_(255), "(?s)weight_scale.*out of range"),
])
def test_wrong_tensors_are_refused(made: Any, tmp_path: Path, name: str, edit: Callable[[Tensors], object],
                                   named: str) -> None:
    source = made(name)[0]
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ModelLoadError, match=named):
        loaded(tmp_path)


def test_tp_never_cuts_a_group(made: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)tp=2 cuts.*'fp8-block'.*64 outputs.*multiple of 24.*below is 1"):
        build(made("fp8-blocks-across")[0], Topology(2))
    with pytest.raises(ConfigError, match=r"(?s)tp=4 cuts.*'int4-groups'.*24 inputs.*multiple of 16.*below is 3"):
        build(made("int4-packed")[0], Topology(4))


@pytest.mark.parametrize("scheme", ON_LOAD)
def test_a_dense_checkpoint_loses_bits_on_load(checkpoint: Callable[[str], Path], scheme: str) -> None:
    path = checkpoint("qwen3")
    model, plain = loaded(path, quantize=scheme), dict(loaded(path).named_modules())
    steps = {"fp8": 1 / 16, "int8": 1 / 254, "int4": 1.6 / 15}  # steps over the largest value
    seen = 0
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and layer.dense:
            seen += 1
            dense, got = plain[name].weight, layer.scheme.dequantize(layer)
            largest = dense.abs().amax(1, keepdim=True)
            step = steps["int8" if layer is model.head else scheme]
            assert ((got - dense).abs() <= step * largest + 1e-6).all(), name
            assert sum(t.numel() * t.itemsize for n, t in layer.named_parameters() if n != "bias") < dense.numel() * 1.2
    heads = {"fp8": "dense", "int8": "int8-channel", "int4": "int8-channel"}
    assert seen == 4 * len(model.stage) + (scheme != "fp8") and model.head.scheme.name == heads[scheme]
    if scheme != "int4":  # whose groups of 64 inputs two ranks of 48 would cut
        parts = [loaded(path, Topology(2, 1, rank), quantize=scheme).layers[0].mlp.down for rank in range(2)]
        whole = model.layers[0].mlp.down
        scale = max(part.scheme.dequantize(part).abs().max() for part in parts)
        torch.testing.assert_close(torch.cat([part.scheme.dequantize(part) for part in parts], 1),
                                   whole.scheme.dequantize(whole), rtol=0, atol=2 * float(scale * steps[scheme]))


@pytest.mark.parametrize("topology", [Topology(), Topology(2, 1, 1), Topology(1, 2, 1)], ids=["whole", "tp", "pp"])
@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_a_tied_head_gets_a_copy_in_8_bits_and_the_embeddings_stay_dense(
        checkpoint: Callable[[str], Path], impl: str, topology: Topology) -> None:
    path = checkpoint("qwen2-tied")
    if impl == "transformers" and topology.pp > 1:
        pytest.skip("the head is no attribute of its own there")
    model = loaded(path, topology, quantize="int4" if topology.tp == 1 else "int8", impl=impl)
    heads = [m for m in model.modules() if isinstance(m, Linear) and m.spec.name == model.config.embedding_name]
    assert model.config.tie_embeddings and [head.scheme.name for head in heads] == ["int8-channel"]
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    rows = heads[0].outputs[0]
    table = table[topology.tp_rank * rows:][:rows]
    got = heads[0].scheme.dequantize(heads[0])[:len(table)]
    assert ((got - table).abs() <= table.abs().amax(1, keepdim=True) / 254 + 1e-6).all() and not got.equal(table)
    if topology.is_first_stage and impl == "native":
        torch.testing.assert_close(model.embed.weight[:len(table)], table)


def test_a_quantised_checkpoint_is_not_quantised_again(made: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)quantised already.*'int4'.*'awq'"):
        LLM(made("awq")[0], quantize="int4")
    with pytest.raises(ConfigError, match=r"(?s)unknown quantize.*fp8, int8, int4"):
        LLM(quantize="int3")


_PEAK = """
import resource, sys, threading, time, torch
from pathlib import Path
from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights
from hal.config import EngineConfig, Topology
from hal.contracts.communicator import LocalCommunicator
from hal.model_config import ExpertsConfig
from hal.models import build_model
from hal.models.memory import memory_line, weight_bytes
from hal.models.ops import Ops
from hal.weights.configs import ON_LOAD
from hal.weights.eight_bits import EightBits
from hal.weights.formats import schemes
from hal.weights.grid import Inputs
from hal.weights.groups import Gptq

def now():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

config = read_config(sys.argv[1], quantize=sys.argv[2])
before, stages = now(), set()
peak = before
def progress(what, done, total):
    stages.add(what)
def watch():
    global peak
    while True:
        peak = max(peak, now())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
model = build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("cpu"))
load_weights(model, sys.argv[1], progress)
time.sleep(0.01)
assert "quantizing weights" in stages
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_the_peak_of_memory_on_load(tmp_path: Path, scheme: str) -> None:
    """All pages that are mapped count, with those of the file, against the larger form, which is the dense one."""
    checkpoints.save_model("llama", dict(
        vocab_size=256, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64), tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", _PEAK, str(tmp_path), scheme]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0.1 * size < int(ran.stdout) < 1.3 * size


def test_the_memory_that_weights_take(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("qwen3")
    held = weight_bytes(read_config(path, quantize="int8"), "bfloat16", Topology(2))
    model = build_model(read_config(path), Topology(2), LocalCommunicator(), Ops(), torch.bfloat16, torch.device("cpu"))
    rounded = [layer for layer in model.modules() if isinstance(layer, Linear)]
    values = sum(layer.weight.numel() + 4 * layer.weight.shape[0] for layer in rounded)
    assert held["int8-channel"] == (len(rounded), values) and "dense" not in held
    linear = sum(p.nbytes for layer in rounded for p in layer.parameters())
    assert held["other"] == (0, sum(p.nbytes for p in model.parameters()) - linear)
    text = memory_line(EngineConfig(kv_dtype="fp8"), read_config(path, quantize="int8"), "bfloat16")
    assert "int8-channel 0.1 in 13 layers" in text
    assert "KV cache in fp8, half the bytes of bfloat16, with scales of 1" in text


def with_kv_scales(source: Path, path: Path, k: float, v: float, weights: Path | None = None) -> None:
    tensors = load_file((weights or source) / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([k])
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor(v)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (path / "config.json").write_text(json.dumps(config))


def test_a_dense_checkpoint_may_have_scales_of_the_kv_cache(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """LLM Compressor writes this configuration where it quantises nothing but the cache."""
    source = checkpoint("qwen3")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = published.compressed("dense", {}) | {"config_groups": {}, "ignore": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with_kv_scales(tmp_path, tmp_path, 2000.0, 3000.0, source)
    exact = prompt_logprobs(source)
    torch.testing.assert_close(prompt_logprobs(tmp_path), exact, rtol=0, atol=1e-5)
    assert (prompt_logprobs(tmp_path, kv_dtype="fp8") - exact).abs().mean() > 5 * (
        prompt_logprobs(source, kv_dtype="fp8") - exact).abs().mean()


def prompt_logprobs(path: Path, **options: Any) -> torch.Tensor:
    with LLM(path, device="cpu", dtype="float32", max_model_len=64, num_blocks=32, block_size=4, **options) as llm:
        output, = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=1, prompt_logprobs=0))
    return torch.tensor([entry.logprob for entry in (output.prompt_logprobs or [])[1:] if entry is not None])


def test_the_kv_cache_takes_the_scales_of_the_checkpoint(made: Any, tmp_path: Path) -> None:
    """Values near 1 lie in the middle of fp8's range. A scale of 100 makes them so small that fp8 loses bits, and a
    scale of 0.01 keeps their error. Without fp8 nothing changes."""
    source = made("awq")[0]
    exact = prompt_logprobs(source)
    errors = {}
    for k, v in ((1.0, 1.0), (0.01, 0.02), (2000.0, 3000.0)):
        with_kv_scales(source, tmp_path, k, v)
        torch.testing.assert_close(prompt_logprobs(tmp_path), exact, rtol=0, atol=1e-5)
        errors[k] = float((prompt_logprobs(tmp_path, kv_dtype="fp8", max_num_batched_tokens=16) - exact).abs().mean())
    assert 1e-3 < errors[0.01] < 2 * errors[1.0] < errors[2000.0]
    with_kv_scales(source, tmp_path, 0.0, 1.0)
    with pytest.raises(ModelLoadError, match=r"(?s)not above 0.*0\.0 and 1\.0"):
        prompt_logprobs(tmp_path, kv_dtype="fp8")
    with pytest.raises(ModelLoadError, match=r"(?s)scales of the KV cache.*'int'"):
        schemes({**FORMATS["int4-packed"][0], "kv_cache_scheme": {"num_bits": 8, "type": "int"}})


def test_an_fp8_cache_gives_the_same_however_a_prompt_is_cut(made: Any) -> None:
    path = made("awq")[0]
    whole, cut = (prompt_logprobs(path, kv_dtype="fp8", max_num_batched_tokens=n) for n in (64, 7))
    torch.testing.assert_close(whole, cut, rtol=0, atol=2e-4)
