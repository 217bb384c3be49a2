"""GGUF files in K types, written from a seed. llama_cpp_values.json holds llama.cpp's log-probabilities of them.

`python tests/weights/llama_cpp_values.py`, where llama-cpp-python is installed, writes the JSON file anew. llama.cpp
0.3.36's wheel on a CPU with AVX-512 made it, with the KV cache in F32.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VALUES = Path(__file__).with_suffix(".json")
NAMES = ("llama", "qwen2", "qwen3", "mixtral", "qwen2moe", "qwen3moe")
EXPERTS, USED, EXPERT_INNER = 4, 2, 256
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV, LENGTH = 256, 256, 512, 2, 4, 2, 24
TYPES = {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "attn_output": "Q4_K", "ffn_gate": "Q5_K",
         "ffn_up": "Q4_K", "ffn_down": "Q6_K", "output": "Q6_K", "ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q4_K",
         "ffn_down_exps": "Q6_K", "ffn_gate_shexp": "Q4_K", "ffn_up_shexp": "Q5_K", "ffn_down_shexp": "Q6_K"}


def prompt() -> list[int]:
    return [int(token) for token in np.random.default_rng(1).integers(0, VOCAB, LENGTH)]


def write(path: Path, name: str, dense: bool = False, only: str | None = None, head: int = 64) -> Path:
    """The file of an architecture; with `dense` the same values in F32, as the gguf package dequantises them. All
    matrices are of the type `only`, if it is given. `head`: a head's size."""
    import gguf

    mixture, shared = NAMES.index(name) > 2, name == "qwen2moe"
    writer = gguf.GGUFWriter(path, "llama" if name == "mixtral" else name)
    rng, inner = np.random.default_rng(NAMES.index(name)), EXPERT_INNER if name == "mixtral" else INNER
    writer.add_tokenizer_model("no_vocab")
    for add, value in ((writer.add_vocab_size, VOCAB), (writer.add_context_length, 64),
                       (writer.add_embedding_length, HIDDEN), (writer.add_block_count, LAYERS),
                       (writer.add_feed_forward_length, inner), (writer.add_head_count, HEADS),
                       (writer.add_head_count_kv, KV), (writer.add_key_length, head), (writer.add_value_length, head),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 10000.0),
                       *([(writer.add_expert_count, EXPERTS), (writer.add_expert_used_count, USED),
                          (writer.add_expert_feed_forward_length, EXPERT_INNER)] if mixture else [])):
        add(value)
    if shared:
        writer.add_expert_shared_feed_forward_length(EXPERT_INNER)

    def vector(key: str, size: int, middle: float = 1.0) -> None:
        writer.add_tensor(key, (middle + rng.normal(0, 0.1, size)).astype(np.float32))

    def matrix(key: str, part: str, rows: int, columns: int) -> None:
        kind = gguf.GGMLQuantizationType[only or TYPES[part]]
        values, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
        for at, scale in {"Q4_K": ((0, 3e-4), (2, 3e-4)), "Q5_K": ((0, 1.5e-4), (2, 3e-4)),
                          "Q6_K": ((208, 3e-5),), "Q4_0": ((0, 1e-2),), "Q8_0": ((0, 1e-3),)}[kind.name]:
            blocks[:, :, at:at + 2] = (rng.uniform(0.5, 1.5, blocks.shape[:2]) * scale).astype(
                np.float16)[..., None].view(np.uint8)
        data = blocks.reshape(EXPERTS, rows // EXPERTS, -1) if part.endswith("exps") else blocks.reshape(rows, -1)
        if dense:
            writer.add_tensor(key, gguf.quants.dequantize(data, kind).astype(np.float32))
        else:
            writer.add_tensor(key, data, raw_dtype=kind)

    writer.add_tensor("token_embd.weight", rng.normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32))
    sizes = {"attn_q": (HEADS * head, HIDDEN), "attn_k": (KV * head, HIDDEN), "attn_v": (KV * head, HIDDEN),
             "attn_output": (HIDDEN, HEADS * head)}
    for suffix, count, wanted in (("", 1, not mixture), ("_exps", EXPERTS, mixture), ("_shexp", 1, shared)):
        size = EXPERT_INNER if mixture else INNER
        sizes |= {f"ffn_gate{suffix}": (count * size, HIDDEN), f"ffn_up{suffix}": (count * size, HIDDEN),
                  f"ffn_down{suffix}": (count * HIDDEN, size)} if wanted else {}
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            vector(f"blk.{i}.{norm}.weight", HIDDEN)
        for norm in ("attn_q_norm", "attn_k_norm") if name.startswith("qwen3") else ():
            vector(f"blk.{i}.{norm}.weight", head)
        for part, (rows, columns) in sizes.items():
            matrix(f"blk.{i}.{part}.weight", part, rows, columns)
            if name.startswith("qwen2") and part in ("attn_q", "attn_k", "attn_v"):
                vector(f"blk.{i}.{part}.bias", rows, 0.0)
        for part, rows in (("ffn_gate_inp", EXPERTS), ("ffn_gate_inp_shexp", 1)) if mixture else ():
            if rows > 1 or shared:
                router = rng.normal(0, 0.1, (rows, HIDDEN)).astype(np.float32)
                writer.add_tensor(f"blk.{i}.{part}.weight", router if rows > 1 else router[0])
    vector("output_norm.weight", HIDDEN)
    matrix("output.weight", "output", VOCAB, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def log_probabilities(path: Path) -> NDArray[np.float64]:
    """Of llama.cpp, [LENGTH, VOCAB]."""
    from llama_cpp import Llama

    model: Any = Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
    model.eval(prompt())
    logits = np.array(model.scores[:LENGTH], np.float64)
    logits -= logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


if __name__ == "__main__":
    saved: dict[str, dict[str, list[list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            for form in ("k", "f32"):
                values = log_probabilities(write(Path(folder) / f"{name}-{form}.gguf", name, form == "f32"))
                saved.setdefault(name, {})[form] = [[round(float(x), 5) for x in (row.argmax(), *row[:6])]
                                                    for row in values]
    VALUES.write_text(json.dumps(saved) + "\n")
