"""Tiny random EAGLE-3 heads in the published layout, and their forward pass in plain PyTorch as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS, HEAD_DIM, INNER, EPS, THETA = 4, 2, 16, 96, 1e-5, 10000.0


def save(directory: Path, *, vocab: int, hidden: int, drafts: int | None = None, embeddings: bool = False,
         positions: int = 256, seed: int = 0, **config: Any) -> Path:
    """`hidden`: of the target and of the head. `drafts`: tokens that the head can propose; None: all."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def matrix(out: int, inner: int) -> torch.Tensor:
        return torch.randn(out, inner, generator=generator) * inner ** -0.5

    def norm() -> torch.Tensor:
        return torch.rand(hidden, generator=generator) + 0.5

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {
        "fc.weight": matrix(hidden, 3 * hidden), "norm.weight": norm(),
        "lm_head.weight": 4 * matrix(drafts or vocab, hidden),
        "midlayer.input_layernorm.weight": norm(), "midlayer.hidden_norm.weight": norm(),
        "midlayer.post_attention_layernorm.weight": norm(),
        "midlayer.self_attn.q_proj.weight": matrix(q, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": matrix(kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": matrix(kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": matrix(hidden, q),
        "midlayer.mlp.gate_proj.weight": matrix(INNER, hidden), "midlayer.mlp.up_proj.weight": matrix(INNER, hidden),
        "midlayer.mlp.down_proj.weight": matrix(hidden, INNER)}
    if embeddings:
        tensors["embed_tokens.weight"] = torch.randn(vocab, hidden, generator=generator)
    if drafts is not None:
        chosen = torch.randperm(vocab, generator=generator)[:drafts].sort().values
        tensors["d2t"] = chosen - torch.arange(drafts)
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, chosen, True)
    save_file(tensors, str(directory / "model.safetensors"))
    (directory / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": positions,
        "rms_norm_eps": EPS, "rope_theta": THETA, "tie_word_embeddings": False, "torch_dtype": "float32",
        "vocab_size": vocab, "draft_vocab_size": drafts, **config}), encoding="utf-8")
    return directory


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """x [n, heads, dim] at the positions 0 to n - 1."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * THETA ** (-torch.arange(half) / half)
    turned = torch.polar(torch.ones(()), angles)[:, None] * torch.complex(x[..., :half], x[..., half:])
    return torch.cat((turned.real, turned.imag), -1)


def forward(directory: Path, embedding: torch.Tensor, token_ids: torch.Tensor, hidden: torch.Tensor, *,
            before: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The head over one whole sequence.

    Args:
        embedding: [vocab, hidden]. token_ids: [n], of the tokens after the places 0 to n - 1.
        hidden: [n, hidden], of the target behind `fc`, or of the head itself. before: norm_before_residual.

    Returns:
        The hidden states before the final norm, [n, hidden], and the logits over the target's vocabulary.
    """
    w, n = load_file(directory / "model.safetensors"), len(token_ids)
    layer = {name.removeprefix("midlayer."): x for name, x in w.items()}
    normed = _norm(hidden, layer["hidden_norm.weight"])
    x = torch.cat((_norm(embedding[token_ids], layer["input_layernorm.weight"]), normed), -1)
    q, k, v = ((x @ layer[f"self_attn.{name}_proj.weight"].T).view(n, -1, HEAD_DIM) for name in "qkv")
    q, k = _rotate(q), _rotate(k)
    mixed = torch.zeros(n, HEADS, HEAD_DIM)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = q[:, head] @ k[:, group].T / HEAD_DIM ** 0.5
        weights = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        mixed[:, head] = weights @ v[:, group]
    x = (normed if before else hidden) + mixed.flatten(1) @ layer["self_attn.o_proj.weight"].T
    inner = _norm(x, layer["post_attention_layernorm.weight"])
    gate, up = (inner @ layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    x = x + (gate * gate.sigmoid() * up) @ layer["mlp.down_proj.weight"].T
    logits = _norm(x, w["norm.weight"]) @ w["lm_head.weight"].T
    if "d2t" in w:
        full = torch.full((n, len(embedding)), -torch.inf)
        full[:, torch.arange(logits.shape[1]) + w["d2t"]] = logits
        logits = full
    return x, logits
