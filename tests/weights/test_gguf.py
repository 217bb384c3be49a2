"""GGUF files, written by the gguf package, against the dequantised model in Hugging Face format."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # `test_published`

import llama_cpp_values
from test_published import PROMPTS, build, forward, loaded

from hal import LLM, SamplingParams
from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights
from hal.cli import main
from hal.config import Topology
from hal.errors import ConfigError, ModelLoadError
from hal.models.memory import weight_bytes
from hal.weights.gguf import BLOCKS, GgufBlocks

gguf = pytest.importorskip("gguf")
QUANTS, Type = gguf.quants, gguf.GGMLQuantizationType
# Of each projection. q and k of different types are not merged, and a type without a scheme is dequantised.
TYPES = {"q_proj": "Q8_0", "k_proj": "Q4_0", "v_proj": "Q6_K", "o_proj": "Q4_K", "gate_proj": "Q5_K", "up_proj": "Q5_K",
         "down_proj": "F16", "embed_tokens": "Q8_0", "lm_head": "Q6_K"}
OTHER = {**TYPES, "q_proj": "Q5_0", "k_proj": "BF16", "up_proj": "Q4_0", "lm_head": "F32"}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "llama": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, TYPES),
    "qwen2": ({}, OTHER), "qwen3": ({"head_dim": 64, "tie_word_embeddings": True}, TYPES),
    "qwen2moe": ({**EXPERTS, "shared_expert_intermediate_size": 32}, {**OTHER, "down_proj": "Q5_0"}),
    "qwen3moe": ({**EXPERTS, "head_dim": 64, "norm_topk_prob": True}, {**TYPES, "down_proj": "Q4_0"})}
SHORT = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
         "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
         "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "gate": "ffn_gate_inp",
         "shared_expert_gate": "ffn_gate_inp_shexp"}


def blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random bytes of a type, whose fp16 factors are small numbers."""
    values, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for at in {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:
        usual = 4e-4 if "K" in kind else 2e-2
        small = rng.uniform(0.5, 1.5, data.shape[:2]) * {"Q8_0": 2e-3, "Q6_K": 6e-5}.get(kind, usual)
        data[:, :, at:at + 2] = small.astype(np.float16)[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def write(directory: Path, name: str) -> tuple[Path, Path]:
    """A GGUF file, and a checkpoint of the same values in fp32."""
    options, types = MODELS[name]
    shape: dict[str, Any] = dict(
        vocab_size=checkpoints.VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False)
    dense = checkpoints.save_model(name.replace("moe", "_moe"), {**shape, **options}, directory / "dense")
    config, tensors = json.loads((dense / "config.json").read_text()), stacked(load_file(dense / "model.safetensors"))
    path = directory / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, name)
    writer.add_vocab_size(checkpoints.VOCAB)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_block_count(2)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(500000.0 if name == "llama" else 10000.0)
    if "head_dim" in options:
        writer.add_key_length(options["head_dim"])
    if "num_experts" in options:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    writer.add_eos_token_id(7)
    if name == "llama":
        writer.add_tensor("rope_freqs.weight", llama3_factors(64, 500000.0))
    for i, (key, weight) in enumerate(tensors.items()):
        *_, part, what = key.removeprefix("model.").split(".")
        place = f"blk.{key.split('.')[2]}.{SHORT[part]}" if "layers" in key else {
            "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[part]
        place += "_exps" * (".experts." in key) + "_shexp" * (".shared_expert." in key)
        kind, heads = types.get(part, "F32") if weight.ndim > 1 else "F32", {"q_proj": 4, "k_proj": 2}.get(part)
        turns = name == "llama" and heads is not None
        if kind in ("F32", "F16", "BF16"):
            value = weight if kind == "F32" else weight.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind])
            tensors[key] = value.float()
            stored = turned(value.float().numpy(), heads) if turns else value.float().numpy()
            data = stored.astype(np.float16) if kind == "F16" else (
                QUANTS.quantize(stored, Type.BF16) if kind == "BF16" else stored)
        else:
            data = blocks(kind, weight.shape[:-1].numel(), weight.shape[-1], seed=i).reshape(*weight.shape[:-1], -1)
            values = torch.from_numpy(QUANTS.dequantize(data, Type[kind]).copy())
            tensors[key] = values if not turns else turned_back(values, heads)
        data = data[0] if part == "shared_expert_gate" else data  # llama.cpp has a vector
        raw = {} if kind in ("F32", "F16") else {"raw_dtype": Type[kind]}
        writer.add_tensor(f"{place}.{what}", data, **raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({k: v.contiguous() for k, v in unstacked(tensors).items()}, dense / "model.safetensors", {"format": "pt"})
    return path, dense


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of all experts as one, without the experts' numbers in the names."""
    found: dict[str, list[torch.Tensor]] = {}
    order = sorted(tensors, key=lambda key: [int(part) if part.isdigit() else 0 for part in key.split(".")])
    for key in order:
        found.setdefault(re.sub(r"experts\.\d+", "experts", key), []).append(tensors[key])
    return {key: torch.stack(parts) if ".experts." in key else parts[0] for key, parts in found.items()}


def unstacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {key: value for key, value in tensors.items() if ".experts." not in key}
    for key in tensors.keys() - found.keys():
        found |= {key.replace("experts", f"experts.{i}"): value for i, value in enumerate(tensors[key])}
    return found


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that the conversion of Llama gives q and k."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def turned_back(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.view(heads, len(weight) // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def llama3_factors(dim: int, theta: float) -> np.ndarray:
    wavelength = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((64 / wavelength - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    done: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in done:
            done[name] = write(tmp_path_factory.mktemp(name), name)
        return done[name]

    return make


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_have_the_values_of_the_format(kind: str) -> None:
    data = blocks(kind, 16, 512, 0)
    expected = torch.from_numpy(QUANTS.dequantize(data, Type[kind]).copy())
    got = BLOCKS[kind][2](torch.from_numpy(data).reshape(-1, BLOCKS[kind][1])).view(16, 512)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@given(kind=st.sampled_from(sorted(BLOCKS)), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_block_has_the_bits_of_the_package(kind: str, seed: int) -> None:
    """Factors of any finite fp16, subnormal ones too."""
    data = np.random.default_rng(seed).integers(0, 256, (8, BLOCKS[kind][1]), dtype=np.uint8)
    for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        data[:, at + 1] &= np.where((data[:, at + 1] & 124) == 124, 187, 255).astype(np.uint8)  # no inf and no nan
    expected = torch.from_numpy(QUANTS.dequantize(data, Type[kind]).copy())
    assert torch.equal(BLOCKS[kind][2](torch.from_numpy(data)), expected)


def rounding(self: GgufBlocks, x: torch.Tensor, layer: Any) -> torch.Tensor:
    """As llama.cpp multiplies by K types: each 256 inputs are rounded to 8 bits (Q8_K) first."""
    parts = x.view(len(x), -1, 256)
    scale = -127 / parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    rounded = (parts * scale).round().clamp(max=127) / scale
    return torch.nn.functional.linear(rounded.view(x.shape), self.dequantize(layer), layer.bias)


@pytest.mark.slow
@pytest.mark.parametrize("name", llama_cpp_values.NAMES)
def test_log_probabilities_are_those_of_llama_cpp(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the dequantised values in F32, and of K types once inputs are rounded as llama.cpp rounds them. So that
    rounding alone parts hal, which keeps inputs exact, from llama.cpp."""
    saved = json.loads(llama_cpp_values.VALUES.read_text())[name]
    prompt, paths = llama_cpp_values.prompt(), {}
    for form in ("f32", "k"):
        paths[form] = llama_cpp_values.write(tmp_path / f"{form}.gguf", name, form == "f32")
    exact = {form: forward(loaded(path), prompt) for form, path in paths.items()}
    torch.testing.assert_close(exact["k"], exact["f32"], rtol=0, atol=2e-4)
    monkeypatch.setattr(GgufBlocks, "linear", rounding)
    off = {}
    for what, form, got in (("f32", "f32", exact["f32"]), ("rounded", "k", forward(loaded(paths["k"]), prompt)),
                            ("exact", "k", exact["k"])):
        best, values = (torch.tensor([row[part] for row in saved[form]]) for part in (slice(1), slice(1, None)))
        off[what] = (got[:, :values.shape[1]] - values).abs().amax(1)
        top = got.topk(2, -1).values
        sure = top[:, 0] - top[:, 1] > 0.1
        assert what == "exact" or (sure.sum() > 8 and (got.argmax(-1) == best[:, 0])[sure].all())
    # An input halfway between two integers may be rounded to the other one, so a few positions differ by more.
    assert off["f32"].max() < 2e-3 and off["rounded"].max() < 0.1
    assert off["rounded"].median() < 2e-4 and off["exact"].median() > 5 * off["rounded"].median()


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_the_dequantised_model(made: Any, name: str) -> None:
    path, dense = made(name)
    model, plain = loaded(path), loaded(dense)
    for prompt in PROMPTS:
        torch.testing.assert_close(forward(model, prompt), forward(plain, prompt), rtol=0, atol=2e-3)
    assert model.config.eos_token_ids == (7,) and model.config.dtype == "bfloat16"
    held = weight_bytes(model.config, "bfloat16")
    rows = {"qwen2": 512, "qwen2moe": 32, "qwen3moe": 0}.get(name, 1024)  # without those of experts
    assert (held["gguf-Q5_K"].bytes if rows else 0) == 2 * rows * 176
    assert "gguf-Q5_0" not in held
    if "moe" in name:
        assert held["experts gguf-Q5_K"].bytes == 2 * 4 * 64 * (1 if name == "qwen2moe" else 2) * 176


def test_ranks_hold_their_part(made: Any) -> None:
    path, dense = made("llama")
    for rank in range(2):
        topology = Topology(2, 1, rank)
        try:
            ours = loaded(path, topology)
        except ConfigError as error:
            assert "tp=2 cuts a group of the weight scheme 'gguf-Q4_K'" in str(error)  # o_proj: 128 of 256 inputs
            return
        load_weights(ours, dense)
    raise AssertionError("a block was cut")


@pytest.mark.slow
def test_engines(made: Any) -> None:
    """Of one rank, and of two stages, against transformers."""
    path, dense = made("llama")
    model = checkpoints.load(dense)
    expected = [checkpoints.greedy(model, prompt, 8) for prompt in PROMPTS]
    for options in ({}, {"pp": 2}):
        with LLM(path, device="cpu", dtype="float32", num_blocks=32, **options) as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True))
        for output, (tokens, leads) in zip(outputs, expected, strict=True):
            sure = next((i for i, lead in enumerate(leads) if lead < 1e-2), len(leads))
            assert sure > 2 and output.token_ids[:sure] == tokens[:sure]


def test_the_command_line_takes_a_file_as_the_model(made: Any, capsys: pytest.CaptureFixture[str],
                                                    tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2, 3]}')
    assert main(["generate", str(made("qwen3")[0]), "--input", str(prompts), "--json", "--max-tokens", "2", "--device",
                 "cpu", "--num-blocks", "16", "--max-model-len", "32"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 2


def test_a_vocabulary_in_the_file_or_beside_it(made: Any, tmp_path: Path) -> None:
    from hal.config import BUNDLED_MODEL
    from hal.engine.text import encode, load_tokenizer

    path = made("qwen3")[0]
    assert load_tokenizer(str(path)) is None
    inside = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(inside, "qwen2")
    tokens = [chr(i) for i in range(33, 127)] + ["ab", "<end>"]
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 95 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(95)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert encode(load_tokenizer(str(inside)), "cab") == [tokens.index("c"), 94]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(BUNDLED_MODEL) / name).read_bytes())
    assert encode(load_tokenizer(str(inside)), "1+2=") == encode(load_tokenizer(str(BUNDLED_MODEL)), "1+2=")


@pytest.mark.parametrize("share", [0.0, 0.0003, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(made: Any, tmp_path: Path, share: float) -> None:
    data = made("qwen3")[0].read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:int(len(data) * share)])
    with pytest.raises(ModelLoadError, match=r"(?s)GGUF file cannot be read.*cut\.gguf.*complete GGUF file"):
        build(path)


def test_other_files_are_refused(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"(?s)architecture of GGUF.*'mamba'.*llama, qwen2, qwen3"):
        LLM(other)
    with pytest.raises(ModelLoadError, match="does not exist"):
        LLM(tmp_path / "none.gguf")
    with pytest.raises(ConfigError, match=r"(?s)quantised already.*'gguf'"):
        read_config(made("qwen3")[0], quantize="int8")
    moved = tmp_path / "again.gguf"
    moved.write_bytes(made("qwen3")[0].read_bytes())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"hal-runtime\[gguf\]"):
        read_config(moved)
