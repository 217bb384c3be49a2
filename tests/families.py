"""Tiny checkpoints of every native family, by name, and the check of an engine's outputs against transformers in fp64.

The windows are 8 tokens and the longest prompt has 40, so every window ends inside the prompt and inside its chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import checkpoints
import torch

from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput
from hal.sampling.params import SamplingParams

SHAPE: dict[str, Any] = dict(
    vocab_size=checkpoints.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False)
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
_LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 6, partial_rotary_factor=0.75,
             long_factor=[1.0, 1.1, 1.5, 2.0, 3.0, 4.0])
_TYPES = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-yarn": ("llama", dict(rope_parameters=_YARN)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0, 1, 0], tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(head_dim=32, query_pre_attn_scalar=24, attn_logit_softcapping=4.0,
                              final_logit_softcapping=6.0, tie_word_embeddings=True, **_TYPES)),
    "gemma3": ("gemma3_text", dict(head_dim=32, query_pre_attn_scalar=24, tie_word_embeddings=True, **_TYPES,
                                   rope_parameters=dict(
                                       full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e6),
                                       sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
    "phi3": ("phi3", dict(sliding_window=8)),
    "phi4-longrope": ("phi3", dict(rope_parameters=_LONG, original_max_position_embeddings=32)),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", dict(**_TYPES, rope_parameters=dict(
        full_attention=_YARN, sliding_attention=dict(rope_type="default", rope_theta=5e5)))),
    "glm4": ("glm4", dict(head_dim=32)),
}
_LATENT: dict[str, Any] = dict(
    num_hidden_layers=2, first_k_dense_replace=1, num_key_value_heads=4, num_experts_per_tok=3, n_shared_experts=1,
    moe_intermediate_size=40, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24)
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", dict(num_local_experts=4, sliding_window=8)),
    "qwen3-moe": ("qwen3_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=16,
                                    mlp_only_layers=[1], norm_topk_prob=False)),
    "qwen2-moe": ("qwen2_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40,
                                    shared_expert_intermediate_size=48, use_sliding_window=True, sliding_window=8,
                                    num_hidden_layers=2)),
    "gpt-oss": ("gpt_oss", dict(num_local_experts=6, num_experts_per_tok=3, head_dim=16, swiglu_limit=1.5,
                                sliding_window=8, num_hidden_layers=2, rope_parameters={**_YARN, "truncate": False})),
    "glm4-moe": ("glm4_moe", dict(n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=16,
                                  use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.5,
                                  num_hidden_layers=2)),
    "deepseek-v2": ("deepseek_v2", dict(_LATENT, q_lora_rank=None, n_routed_experts=6, n_group=3, topk_group=2,
                                        topk_method="group_limited_greedy", routed_scaling_factor=1.5)),
    "deepseek-v3": ("deepseek_v3", dict(_LATENT, q_lora_rank=24, n_routed_experts=8, n_group=4, topk_group=2,
                                        rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7})),
}
_DELTA: dict[str, Any] = dict(
    num_hidden_layers=3, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=12, layer_types=["linear_attention", "full_attention", "linear_attention"])
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": ("qwen3_next", dict(_DELTA, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40,
                                      shared_expert_intermediate_size=48, mlp_only_layers=[1])),
    "qwen3.5": ("qwen3_5_text", dict(_DELTA, attention_bias=True)),
}
FAMILIES = {**DENSE, **MIXTURES, **HYBRIDS}
TOKENS = 64
PROMPTS = checkpoints.prompts(3)
LONG = [PROMPTS[0], PROMPTS[0][::-1]]  # transformers takes all of their frequencies from the long factors


def save(name: str, directory: Path) -> Path:
    kind, options = FAMILIES[name]
    return checkpoints.save_model(kind, {**SHAPE, **options}, directory)


def run(path: Path, device: str = "cpu", **options: Any) -> LLM:
    return LLM(str(path), device=device, **{"dtype": "float32", "block_size": 4, **options})


def generate(llm: LLM, prompts: list[list[int]], tokens: int = TOKENS) -> list[RequestOutput]:
    return llm.generate(prompts, SamplingParams(max_tokens=tokens, logprobs=1, ignore_eos=True))


def delta_rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
               initial_state: torch.Tensor | None = None, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule token by token in fp64; called as the function of transformers, which computes in fp32
    whatever the model's dtype is."""
    q, k, v, decay, strength = (x.double() for x in (query, key, value, g, beta))
    q, k = ((x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(v.shape[2] // k.shape[2], 2)
            for x in (q, k))
    state = (q.new_zeros(len(q), v.shape[2], q.shape[3], v.shape[3]) if initial_state is None else
             initial_state.double())
    out = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        new = (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)) * strength[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, state))
    return torch.stack(out, 1), state


@contextmanager
def exact_rule(model: Any) -> Iterator[None]:
    """The layers of transformers with the rule in fp64, where they have one: its own is off by 8e-5 in log-probability
    on these checkpoints, and ours by 1e-5."""
    name, module = "torch_chunk_gated_delta_rule", sys.modules[type(model).__module__]
    with patch.object(module, name, delta_rule) if hasattr(module, name) else nullcontext():
        yield


@torch.no_grad()
def assert_parity(path: Path, prompts: list[list[int]], outputs: list[RequestOutput], margin: float = 1e-4) -> None:
    """Each token is the best of transformers in fp64, or within the margin of it, after the tokens before it; and its
    log-probability is transformers'."""
    model = checkpoints.load(path, torch.float64)
    model.config._experts_implementation = "eager"  # the grouped product has no fp64
    for module in model.modules():
        if hasattr(module, "limit"):  # transformers 5.17 has the published model's limit, whatever the config says
            module.limit = model.config.swiglu_limit
    for prompt, output in zip(prompts, outputs, strict=True):
        with exact_rule(model):
            logits = model(input_ids=torch.tensor([prompt + output.token_ids]), use_cache=False).logits[0]
        theirs = logits[len(prompt) - 1:-1].log_softmax(-1)
        chosen = theirs.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert output.logprobs is not None and len(chosen) == len(output.logprobs)
        ours = torch.tensor([entry.logprob for entry in output.logprobs], dtype=torch.float64)
        torch.testing.assert_close(ours, chosen, rtol=0, atol=margin)
        assert (theirs.max(-1).values - chosen).max() < margin
