"""Write a dense checkpoint of the Llama, Qwen2 or Qwen3 family as a GGUF file, for peers that read no other. Needs
numpy and the gguf package alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

KINDS = {"int8": "Q8_0", "int4": "Q4_0", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
          "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
          "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
          "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
          "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def as_gguf(model: str, kind: str, scratch: str) -> str:
    """A GGUF file of the model: itself, or one in the folder `scratch`."""
    if model.endswith(".gguf"):
        return model
    file = os.path.join(scratch, f"{kind}.gguf")
    write(model, file, kind)
    return file


def write(folder: str, file: str, kind: str) -> None:
    """`kind`: of the matrices, as GGMLQuantizationType spells it: BF16, F16, Q8_0, Q4_0. The vocabulary is made up."""
    config = json.loads((Path(folder) / "config.json").read_text())
    arch, heads, kv_heads = (config[k] for k in ("model_type", "num_attention_heads", "num_key_value_heads"))
    if arch not in ("llama", "qwen2", "qwen3"):
        sys.exit(f"GGUF files are written for llama, qwen2 and qwen3, not for {arch}")
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer = GGUFWriter(file, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    # OpenVINO compiles the vocabulary, and fails unless it has all bytes and a special token.
    vocab = config["vocab_size"]
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's characters for bytes
    tokens = [chr(b) for b in printed] + [chr(256 + i) for i in range(256 - len(printed))]
    writer.add_token_list([*tokens, *(f"t{i}" for i in range(256, vocab))])
    writer.add_token_types([TokenType.NORMAL] * (vocab - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["t 0", "t 1"])
    writer.add_bos_token_id(vocab - 1)
    writer.add_eos_token_id(vocab - 1)
    writer.add_pad_token_id(vocab - 1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_file_type({"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}[kind])
    for name, tensor in _tensors(Path(folder)):
        stem, _, what = name.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blk.{number}."
        if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs lie side by side there
            tensor = tensor.reshape(-1, 2, size // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        chosen = GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        writer.add_tensor(f"{layer}{_NAMES[stem]}.{what}", quants.quantize(tensor, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path):  # type: ignore[no-untyped-def]
    """Name and float32 values of every tensor of the safetensors files."""
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        begin = 8 + int(data[:8].view(np.uint64)[0])
        for name, about in json.loads(data[8:begin].tobytes()).items():
            if name != "__metadata__":
                first, last = about["data_offsets"]
                raw = data[begin + first:begin + last]
                if about["dtype"] == "BF16":
                    values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
                else:
                    values = raw.view({"F16": np.float16, "F32": np.float32}[about["dtype"]]).astype(np.float32)
                yield name, values.reshape(about["shape"])
