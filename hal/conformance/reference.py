"""The reference: a decoder and a sampler in fp64, without cache, batch or kernels."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hal.features.penalties import NO_PENALTIES
from hal.model_config import ModelConfig
from hal.models.rope import inverse_frequencies
from hal.sampling.noise import exponential, row_keys
from hal.sampling.params import SamplingParams


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None,
           softcap: float | None = None, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence, in q's dtype.

    Args:
        q: [queries, heads, dim]. k, v: [context, kv_heads, dim]; the queries are the last of them.
    """
    group, context = q.shape[1] // k.shape[1], k.shape[0]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    behind = torch.arange(context - q.shape[0], context)[:, None] - torch.arange(context)
    hidden = (behind < 0) | (behind >= (window or context))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :context], v)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, dim], fp64, half-split. table: [tokens, dim], cosines and then sines."""
    cos, sin = table[:, None].chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


class Reference:
    """A model with a checkpoint's weights, rounded to a dtype.

    Attributes:
        compute: the dtype in which it computes.
        kept: keys and values of each layer, [tokens, kv_heads, dim] each, as `logits` has last computed them.
    """

    def __init__(self, directory: Path, config: ModelConfig, dtype: str, compute: torch.dtype = torch.float64) -> None:
        self.config, self.compute = config, compute
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.weights = {name: w.to(getattr(torch, dtype)).to(compute) for name, w in
                        load_file(directory / "model.safetensors").items()}

    def logits(self, token_ids: list[int], last: int = 0) -> torch.Tensor:
        """Logits [tokens, vocab] after each token, or after the `last` ones alone."""
        ids, self.kept = torch.tensor(token_ids), []
        hidden = self._llama(ids, last) if self.config.family == "llama" else self._gpt2(ids)[-last:]
        embedding = "embed_tokens.weight" if self.config.family == "llama" else "wte.weight"
        return hidden @ self.weights["lm_head.weight" if not self.config.tie_embeddings else embedding].T

    def hidden(self, token_ids: list[int]) -> torch.Tensor:
        """The states behind the last norm, [tokens, hidden_size]; of the Llama family."""
        return self._llama(torch.tensor(token_ids), 0)

    def _llama(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        c, w, n = self.config, self.weights, len(ids)
        assert c.rope is not None
        angles = torch.arange(n).double()[:, None] * inverse_frequencies(c.rope, c.head_dim).double()
        table, x = torch.cat((angles.cos(), angles.sin()), -1).to(self.compute), w["embed_tokens.weight"][ids]
        for i in range(c.num_layers):
            name = f"layers.{i}."
            normed = rms_norm(x, w[name + "input_layernorm.weight"], c.norm_eps)
            q, k, v = ((normed @ w[f"{name}self_attn.{p}_proj.weight"].T).view(n, -1, c.head_dim) for p in "qkv")
            if c.qk_norm:
                q = rms_norm(q, w[name + "self_attn.q_norm.weight"], c.norm_eps)
                k = rms_norm(k, w[name + "self_attn.k_norm.weight"], c.norm_eps)
            q, k = rotate(q, table), rotate(k, table)
            self.kept.append((k, v))
            if i == c.num_layers - 1:
                q, x = q[-last:], x[-last:]
            out = attend(q, k, v, c.head_dim ** -0.5, c.windows[i])
            x = x + out.flatten(1) @ w[name + "self_attn.o_proj.weight"].T
            normed = rms_norm(x, w[name + "post_attention_layernorm.weight"], c.norm_eps)
            gate, up = (normed @ w[f"{name}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ w[name + "mlp.down_proj.weight"].T
        return rms_norm(x, w["norm.weight"], c.norm_eps)

    def _gpt2(self, ids: torch.Tensor) -> torch.Tensor:
        c, w, n = self.config, self.weights, len(ids)
        x = w["wte.weight"][ids] + w["wpe.weight"][:n]

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.layer_norm(x, (c.hidden_size,), w[name + ".weight"], w[name + ".bias"], c.norm_eps)

        def linear(x: torch.Tensor, name: str) -> torch.Tensor:
            return x @ w[name + ".weight"] + w[name + ".bias"]

        for i in range(c.num_layers):
            qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").view(n, 3, c.num_heads, c.head_dim)
            q, k, v = qkv.unbind(1)
            self.kept.append((k, v))
            out = attend(q, k, v, c.head_dim ** -0.5, None)
            x = x + linear(out.reshape(n, -1), f"h.{i}.attn.c_proj")
            inner = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
            x = x + linear(inner, f"h.{i}.mlp.c_proj")
        return norm(x, "ln_f")


def race(logits: torch.Tensor, params: SamplingParams, seed: int, position: int, history: list[int], prompt: int,
         slack: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens that may be sampled when each logit is uncertain by `slack`.

    Args:
        logits: [vocab] fp64. position: the place of the token to be drawn. history: all tokens before it; the first
            `prompt` of them are the prompt.

    Returns:
        Three arrays [vocab]: the value whose largest is drawn; the tokens that certainly pass the filters; the tokens
        that may pass them.
    """
    scores, all_of = logits.clone(), torch.ones_like(logits, dtype=torch.bool)
    if any(getattr(params, name) != default for name, default in NO_PENALTIES.items()):
        seen = torch.tensor(sorted(set(history)))
        old = scores[seen]
        new = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        counts = torch.bincount(torch.tensor(history[prompt:], dtype=torch.int64), minlength=len(scores))[seen]
        scores[seen] = new - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    for token, value in params.logit_bias:
        scores[token] += value
    if params.temperature == 0:
        return scores, all_of, all_of
    scores, slack = scores / params.temperature, slack / params.temperature
    ordered = scores.sort(descending=True).values
    low = high = torch.tensor(-torch.inf, dtype=torch.float64)
    if params.top_k:
        low = high = ordered[min(params.top_k, len(ordered)) - 1]
    if params.top_p < 1:
        kept = ordered[ordered >= low]
        before = kept.softmax(-1).cumsum(-1) - kept.softmax(-1)
        within = 2 * slack + 1e-6
        low = torch.maximum(low, kept[before < params.top_p + within][-1])
        high = torch.maximum(high, kept[torch.cat((before[:1] * 0, before[1:])) < max(params.top_p - within, 1e-9)][-1])
    if params.min_p > 0:
        least = ordered[0] + torch.tensor(params.min_p, dtype=torch.float64).log()
        low, high = torch.maximum(low, least), torch.maximum(high, least)
    noise = exponential(row_keys(torch.tensor([seed]), torch.tensor([position])),
                        torch.arange(len(scores), dtype=torch.int32)[None])[0].double()
    sure = (scores >= high + 2 * slack) | (scores == ordered[0])
    return scores - noise.log(), sure, scores >= low - 2 * slack
