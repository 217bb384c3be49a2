"""A step of the decoder as one pure function of weights, cache and the step's arrays.

Shapes: T tokens, S sequences, B blocks of a context, L layers, h heads and k key-value heads of size d. The cache is
one array for all layers: [L, num_blocks, 2, block_size, k, d], keys and then values.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hal.model_config import ModelConfig

Weights = dict[str, Any]
FAR = 2**30  # the window of a layer that sees everything before a token
NOTED = "attention.qkv", "attention", "attention.out", "mlp.gate_up", "mlp.down"  # in the order of a layer
TOKENS = 32  # so many tokens gather their contexts at a time, which bounds the memory


class Parts(NamedTuple):
    """What is fixed when a program is traced.

    Attributes:
        last: this is the last pipeline stage. first_row: of the rank's part of the embedding table; None: it has all.
        note: whether to return the results of the linear layers and of attention too.
    """

    config: ModelConfig
    scale: float
    last: bool
    first_row: int | None
    note: bool = False


ACTIVATIONS = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu,
               "relu": jax.nn.relu}


def linear(w: Weights, name: str, x: jax.Array) -> list[jax.Array]:
    """The outputs of each projection of a layer. A projection is an array of its own, so that the compiler can cut it
    by heads."""
    biases = w.get(f"{name}.bias") or [None] * len(w[f"{name}.weight"])
    return [x @ weight.T if bias is None else x @ weight.T + bias
            for weight, bias in zip(w[f"{name}.weight"], biases, strict=True)]


def norm(w: Weights, name: str, x: jax.Array, eps: float) -> jax.Array:
    """The norm that a model has at this place: none, of the root mean square, or with a bias of mean and deviation."""
    if name not in w:
        return x
    wide, weight, bias = x.astype(jnp.float32), w[name], w.get(f"{name}_bias")
    if bias is not None:
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    if bias is not None:
        return (wide * weight + bias).astype(x.dtype)
    return (wide.astype(jnp.promote_types(x.dtype, weight.dtype)) * weight).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def attend(p: Parts, cache: jax.Array, layer: jax.Array, q: jax.Array, m: Weights, window: jax.Array) -> jax.Array:
    """q [T, h, d] over the contexts in the cache -> [T, h * d]."""
    def one(given: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, sequence, position = given  # [h, d], [], []
        found = cache[layer, m["block_tables"][sequence]]  # [B, 2, block_size, k, d]
        keys, values = (found[:, i].reshape(-1, *found.shape[3:]) for i in (0, 1))
        behind = position - jnp.arange(len(keys))
        seen = (behind >= 0) & (behind < window)
        grouped = q.reshape(keys.shape[1], -1, q.shape[-1])
        scores = jnp.einsum("kgd,ckd->kgc", grouped, keys, preferred_element_type=jnp.float32) * p.scale
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1).astype(q.dtype)
        values = jnp.where(seen[:, None, None], values, 0)  # what others left may be NaN, and 0 * NaN is NaN
        return jnp.einsum("kgc,ckd->kgd", weights, values).reshape(-1)

    out: jax.Array = jax.lax.map(one, (q, m["sequence"], m["positions"]), batch_size=TOKENS)
    return out


def attention(p: Parts, w: Weights, cache: jax.Array, m: Weights, layer: jax.Array, x: jax.Array,
              ) -> tuple[jax.Array, jax.Array, Weights]:
    """The first part of a layer: the new cache, this rank's share of the output, and what was noted."""
    w, window, rope = jax.tree.map(lambda of_all: of_all[layer], w["layers"])
    c, eps = p.config, p.config.norm_eps
    projected = linear(w, "attention.qkv", norm(w, "before_attention", x, eps))
    q, k, v = (y.reshape(len(x), -1, c.head_dim) for y in projected)
    q, k = norm(w, "attention.q_norm", q, eps), norm(w, "attention.k_norm", k, eps)
    if c.rope is not None:
        cos, sin = jnp.split(m["angles"][rope][:, None].astype(x.dtype), 2, -1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    slots, size = m["slot_mapping"], cache.shape[3]
    cache = cache.at[layer, slots // size, :, slots % size].set(jnp.stack((k, v), 1))
    attended = attend(p, cache, layer, q, m, window)
    out = linear(w, "attention.out", attended)[0]
    noted = {"attention.qkv": jnp.concatenate(projected, -1), "attention": attended, "attention.out": out}
    return cache, out, noted


def mlp(p: Parts, w: Weights, layer: jax.Array, x: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array, Weights]:
    """The second part: the hidden states with the attention's output, this rank's share of the MLP's, and notes."""
    w, eps = jax.tree.map(lambda of_all: of_all[layer], w["layers"][0]), p.config.norm_eps
    x = x + norm(w, "after_attention", out, eps)
    inner = linear(w, "mlp.gate_up", norm(w, "before_mlp", x, eps))
    activated = ACTIVATIONS[p.config.activation](inner[0])
    down = linear(w, "mlp.down", activated * inner[1] if len(inner) > 1 else activated)[0]
    return x, down, {"mlp.gate_up": jnp.concatenate(inner, -1), "mlp.down": down}


def end(p: Parts, w: Weights, layer: jax.Array, x: jax.Array, down: jax.Array) -> jax.Array:
    """The layer's result, from the sum over all ranks."""
    w = jax.tree.map(lambda of_all: of_all[layer], w["layers"][0])
    return x + norm(w, "after_mlp", down, p.config.norm_eps)


def embed(p: Parts, w: Weights, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """This rank's share of the sum, which the ranks add up."""
    table = w["embed.weight"]
    if p.first_row is None:
        x = table[ids]
    else:
        local = ids - p.first_row
        foreign = (local < 0) | (local >= len(table))
        x = jnp.where(foreign[:, None], 0, table[jnp.where(foreign, 0, local)])
    x = x * jnp.asarray(p.config.embedding_scale, x.dtype)
    return x + w["positions"][positions] if "positions" in w and not p.first_row else x


def logits_of(p: Parts, w: Weights, hidden: jax.Array) -> jax.Array:
    """[n, hidden_size] -> this rank's share of the logits; behind those of the vocabulary may be padding."""
    logits, cap = linear(w, "head", hidden)[0], p.config.logits_softcap
    return logits if cap is None else jnp.tanh(logits / cap) * cap


def prepare(w: Weights, m: Weights) -> Weights:
    """The step's arrays, and what all layers need: each token's sequence and rotary angles."""
    sequence = jnp.searchsorted(m["query_start_loc"][1:], jnp.arange(len(m["positions"])), side="right")
    m = {**m, "sequence": jnp.minimum(sequence, len(m["block_tables"]) - 1)}  # padding belongs to the last one
    return {**m, "angles": w["rope"][:, m["positions"]]} if "rope" in w else m


def finish(p: Parts, w: Weights, rows: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hidden states after the last norm, and the logits of these rows."""
    x = norm(w, "final_norm", x, p.config.norm_eps)
    return x, logits_of(p, w, x[rows])


def step(p: Parts, w: Weights, cache: jax.Array, m: Weights, x: jax.Array | None) -> tuple[Any, ...]:
    """A whole step of a stage, where no other rank shares its tensors: the new cache, the hidden states [T,
    hidden_size], on the last stage the logits, and what was noted of all layers."""
    x, m = embed(p, w, m["input_ids"], m["positions"]) if x is None else x, prepare(w, m)

    def body(carried: tuple[jax.Array, jax.Array], layer: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Weights]:
        x, cache = carried
        cache, out, noted = attention(p, w, cache, m, layer, x)
        x, down, more = mlp(p, w, layer, x, out)
        return (end(p, w, layer, x, down), cache), {**noted, **more} if p.note else {}

    (x, cache), noted = jax.lax.scan(body, (x, cache), jnp.arange(len(cache)))
    return (cache, *finish(p, w, m["logits_indices"], x), noted) if p.last else (cache, x, noted)
