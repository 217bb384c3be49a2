"""Shapes of well-known models, as their config.json describes them: for benchmarks with random weights.

Sources: the published config.json of each model. Only the keys that determine the amount of work are here.
"""

from __future__ import annotations

from typing import Any


def _shape(kind: str, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, positions: int,
           **more: Any) -> dict[str, Any]:
    return {"model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocab,
            "max_position_embeddings": positions, "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None,
            **more}


_LLAMA3: dict[str, Any] = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": _shape("qwen2", 896, 24, 14, 2, 4864, 151936, 32768, rope_theta=1e6, tie_word_embeddings=True),
    "qwen2-1.5b": _shape("qwen2", 1536, 28, 12, 2, 8960, 151936, 32768, rope_theta=1e6, tie_word_embeddings=True),
    "qwen3-0.6b": _shape("qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, rope_theta=1e6, tie_word_embeddings=True,
                         head_dim=128),
    "qwen3-8b": _shape("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960, rope_theta=1e6, head_dim=128),
    "llama-3.2-1b": _shape("llama", 2048, 16, 32, 8, 8192, 128256, 131072, **_LLAMA3, head_dim=64,
                           tie_word_embeddings=True, rope_scaling={
                               "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 8192}),
    "llama-3-8b": _shape("llama", 4096, 32, 32, 8, 14336, 128256, 8192, **_LLAMA3),
    "mistral-7b": _shape("mistral", 4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=10000.0, rms_norm_eps=1e-5,
                         sliding_window=4096),
    "qwen3-30b-a3b": _shape("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, 40960, rope_theta=1e6, head_dim=128,
                            num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True),
    "tiny": _shape("llama", 64, 2, 4, 2, 128, 256, 512, torch_dtype="float32", tie_word_embeddings=True),
    "gpt2": {"model_type": "gpt2", "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None},
}
