"""GGUF files, whose container the `gguf` package reads: the configuration from their metadata, and their tensors.

A linear layer's weight keeps its blocks where hal.weights.gguf has their type. Everything else is dequantised as it is
read: the embeddings, and types that have no scheme. Importing this loads no torch.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from hal.checkpoints.stored import LazyTensor, Stored, shown
from hal.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "qwen2moe": "Qwen2MoeForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}
_MIXTRAL = "MixtralForCausalLM"  # its files call themselves llama, with experts
_TYPES = {"MixtralForCausalLM": "mixtral", "Qwen2MoeForCausalLM": "qwen2_moe", "Qwen3MoeForCausalLM": "qwen3_moe"}
_KEYS = {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
         "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
         "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
         "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
         "attention.layer_norm_rms_epsilon": "rms_norm_eps", "expert_used_count": "num_experts_per_tok"}
_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
          "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
          "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
          "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
          "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj",
          "ffn_down_exps": "mlp.experts.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
          "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
          "ffn_down_shexp": "mlp.shared_expert.down_proj"}
_PARTS_OF_MIXTRAL = {**_PARTS, "ffn_gate_inp": "block_sparse_moe.gate",
                     "ffn_gate_exps": "block_sparse_moe.experts.w1", "ffn_up_exps": "block_sparse_moe.experts.w3",
                     "ffn_down_exps": "block_sparse_moe.experts.w2"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ENTRY = re.compile(r"(.+)\[(\d+)\]")  # an expert's part of the tensor of all experts
KEPT = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")  # types that have a scheme
_FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_FACTORS = "rope_freqs.weight"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).endswith(".gguf") and isfile(path)


class GgufFile:
    """An open file.

    Attributes:
        tensors: by their names in the file. architecture: of the file. model: the architecture as config.json names it.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ConfigError("GGUF files need the gguf package", got=path,
                              hint='pip install "hal-runtime[gguf]"') from None
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.fields: dict[str, Any] = reader.fields
            self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the package checks little, so damage may raise any error
            raise ModelLoadError("the GGUF file cannot be read", got=f"{path}: {type(error).__name__}: {error!s:.120}",
                                 expected="a complete GGUF file, version 2 or 3", hint="download it again") from None
        self.architecture = self.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ModelLoadError("this architecture of GGUF files is not supported", got=shown(self.architecture),
                                 expected=", ".join(ARCHITECTURES), hint="take the checkpoint in Hugging Face format")
        mixtral = self.architecture == "llama" and self.get("llama.expert_count", 0)
        self.model = _MIXTRAL if mixtral else ARCHITECTURES[self.architecture]

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields[key].contents() if key in self.fields else default

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *error: object) -> None:
        """The file stays mapped, since others read it too."""

    def get_slice(self, name: str) -> LazyTensor:
        entry = _ENTRY.fullmatch(name)
        name, expert = (entry[1], int(entry[2])) if entry else (name, None)
        if name not in self.tensors:
            raise SafetensorError(f"no tensor {name}")
        part = _LAYER.fullmatch(name)
        heads = None
        if self.architecture == "llama" and part and part[2] in ("attn_q", "attn_k"):
            heads = self.get("llama.attention.head_count")
            heads = self.get("llama.attention.head_count_kv", heads) if part[2] == "attn_k" else heads
        return _Tensor(self.tensors[name], heads, expert)

    def named(self, name: str) -> str:
        """A tensor's name as in Hugging Face's format without the prefix "model."; that of a tensor of all experts
        lacks the number of the expert. A name that is unknown here stays as it is, and the loader refuses it."""
        parts = _PARTS_OF_MIXTRAL if self.model == _MIXTRAL else _PARTS
        if (part := _LAYER.fullmatch(name)) and part[2] in parts:
            return f"layers.{part[1]}.{parts[part[2]]}.{part[3]}"
        stem, _, kind = name.rpartition(".")
        return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name

    def located(self) -> Iterator[tuple[str, str]]:
        """Of each tensor that a model may read, the name as in Hugging Face's format, and that of `get_slice`."""
        for name, tensor in self.tensors.items():
            named = self.named(name)
            if len(tensor.shape) == 3:
                for expert in range(len(tensor.data) if tensor.data.size else 0):
                    yield named.replace(".experts.", f".experts.{expert}."), f"{name}[{expert}]"
            elif name != _FACTORS:
                yield named, name


class _Tensor:
    """A LazyTensor.

    Attributes:
        heads: those of q or k in a Llama, whose rows alternate between a head's halves in the file.
        expert: only this expert's part of the tensor.
    """

    def __init__(self, tensor: Any, heads: int | None, expert: int | None) -> None:
        self.tensor, self.heads, self.kind = tensor, heads, tensor.tensor_type.name
        self.kept = _keeps(tensor)
        self.data = tensor.data if expert is None else tensor.data[expert]

    def get_shape(self) -> list[int]:
        if self.kept:
            return list(self.data.shape)
        return [int(size) for size in reversed(self.tensor.shape)][-self.data.ndim:]

    def get_dtype(self) -> str:
        return "U8" if self.kept else _FLOATS.get(self.kind, "F32")

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        import torch

        rows, *rest = index if isinstance(index, tuple) and index else (index or slice(None),)
        data = self.data
        if self.heads:
            half = len(data) // self.heads // 2
            data = data[np.arange(len(data)).reshape(self.heads, half, 2).swapaxes(1, 2).reshape(-1)[rows]]
        else:
            data = data[rows]
        if not self.kept and self.kind not in _FLOATS:
            from gguf.quants import dequantize

            data = dequantize(data, self.tensor.tensor_type)
        found = torch.from_numpy(np.array(data, order="C"))
        return (found.view(torch.bfloat16) if self.kind == "BF16" else found)[(slice(None), *rest)]


def _keeps(tensor: Any) -> bool:
    return (tensor.tensor_type.name in KEPT and len(tensor.shape) in (2, 3) and tensor.name != "token_embd.weight"
            and "ffn_gate_inp" not in tensor.name)


def open_gguf(path: Path) -> GgufFile:
    """Raises ConfigError: there is no gguf package. ModelLoadError: the file is damaged, or of another architecture."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise ModelLoadError("the GGUF file cannot be read", got=f"{path}: {error}") from None
    return _opened(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=2)  # to read a vocabulary takes a second
def _opened(path: Path, changed: int, size: int) -> GgufFile:
    return GgufFile(path)


def locate(path: Path) -> dict[str, Stored]:
    """Where each tensor is stored, by its name as in Hugging Face's format without the prefix "model."."""
    return {named: Stored(name, path) for named, name in open_gguf(path).located()}


def config_data(path: Path) -> dict[str, Any]:
    """The content that config.json would have. Raises as open_gguf does."""
    file = open_gguf(path)
    arch, tensors = file.architecture, file.tensors
    data: dict[str, Any] = {"architectures": [file.model], "model_type": _TYPES.get(file.model, arch)}
    data |= {ours: file.get(f"{arch}.{theirs}") for theirs, ours in _KEYS.items() if f"{arch}.{theirs}" in file.fields}
    for name in ("embedding_length", "feed_forward_length", "block_count", "attention.head_count"):
        if _KEYS[name] not in data:
            raise ModelLoadError("the metadata of the GGUF file is incomplete", got=path, expected=f"{arch}.{name}")
    table = tensors.get("token_embd.weight")
    if table is None:
        raise ModelLoadError("the GGUF file lacks the tensor 'token_embd.weight'", got=path)
    data["vocab_size"] = int(table.shape[-1])
    data["tie_word_embeddings"] = "output.weight" not in tensors
    data["torch_dtype"] = {"F32": "float32", "F16": "float16"}.get(table.tensor_type.name, "bfloat16")
    data["attention_bias"] = arch == "llama" and "blk.0.attn_q.bias" in tensors
    data["bos_token_id"] = _token(file, "bos")
    data["eos_token_id"] = [token for token in (_token(file, "eos"), _token(file, "eot")) if token is not None] or None
    data["rope_scaling"] = _scaling(file, data)
    turned = file.get(f"{arch}.rope.dimension_count")
    if turned not in (None, data.get("head_dim", data["hidden_size"] // data["num_attention_heads"])):
        data["partial_rotary_factor"] = 0.5  # which these families refuse, naming it
    if count := file.get(f"{arch}.expert_count", 0):
        data["num_experts"] = data["num_local_experts"] = count
        data["norm_topk_prob"] = arch != "qwen2moe"  # as llama.cpp computes; the metadata does not say it
        for part, key in (("ffn_gate_exps", "moe_intermediate_size"), ("ffn_gate_shexp",
                                                                       "shared_expert_intermediate_size")):
            if (tensor := tensors.get(f"blk.0.{part}.weight")) is not None:
                data[key] = int(tensor.shape[1])
        if file.model == _MIXTRAL:
            data["intermediate_size"] = data.get("moe_intermediate_size", data["intermediate_size"])
    types = {file.named(n).removesuffix(".weight"): t.tensor_type.name for n, t in tensors.items() if _keeps(t)}
    if types:
        data["quantization_config"] = {"quant_method": "gguf", "types": types}
    return data


def _token(file: GgufFile, name: str) -> int | None:
    value = file.get(f"tokenizer.ggml.{name}_token_id")
    return None if value is None else int(value)


def _scaling(file: GgufFile, data: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3 has a factor for each frequency as a tensor; both tables of longrope then have these factors."""
    factors = file.tensors.get(_FACTORS)
    if factors is not None:
        each = [float(value) for value in factors.data.reshape(-1)]
        return {"rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0,
                "original_max_position_embeddings": data.get("max_position_embeddings", 2048)}
    prefix = f"{file.architecture}.rope.scaling"
    kind = file.get(f"{prefix}.type", "none")
    if kind == "none":
        return None
    found = {"rope_type": kind, "factor": file.get(f"{prefix}.factor", 1.0)}
    original = file.get(f"{prefix}.original_context_length")
    return found if original is None else {**found, "original_max_position_embeddings": original}
