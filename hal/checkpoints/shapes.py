"""What each native family's config.json means: one function for each architecture. This loads no torch.

A missing key takes the default that transformers has for that architecture.
"""

from __future__ import annotations

from math import log
from typing import Any

from hal.checkpoints.reader import (
    INT32,
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_INNER,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    Reader,
)
from hal.checkpoints.stored import shown
from hal.errors import ModelLoadError
from hal.model_config import DeltaConfig, ExpertsConfig, LatentConfig, ModelConfig

_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
         "relu": "relu"}


def llama(read: Reader, architecture: str) -> ModelConfig:
    bias = read.flag(False, "attention_bias")
    return _decoder(read, architecture, vocab=32000, inner=11008, kv_heads=None, max_position=2048, bos=1, eos=2,
                    qkv_bias=bias, out_bias=bias, mlp_bias=read.flag(False, "mlp_bias"))


def smollm3(read: Reader, architecture: str) -> ModelConfig:
    """Some layers have no rotary embedding (arXiv 2501.18795)."""
    layers, bias = read.size(36, MAX_LAYERS, "num_hidden_layers"), read.flag(False, "attention_bias")
    every = read.size(4, INT32, "no_rope_layer_interval")
    rotary = read.get(list, None, "no_rope_layers", null=None)
    if rotary is None:
        rotary = [int((i + 1) % every != 0) for i in range(layers)]
    if len(rotary) < layers or not all(value in (0, 1) for value in rotary[:layers]):
        raise read.unusable("no_rope_layers", rotary, f"{layers} entries, each 0 or 1")
    without = tuple(i for i in range(layers) if not rotary[i])
    windowed = read.flag(False, "use_sliding_window")
    window = read.size(None, INT32, "sliding_window", null=None) if windowed else None
    types = ["sliding_attention" if window and i in without else "full_attention" for i in range(layers)]
    return _decoder(read, architecture, vocab=128256, inner=11008, kv_heads=4, max_position=32768, bos=128000,
                    eos=128001, hidden=2048, layers=36, heads=16, theta=2e6, tied=True, qkv_bias=bias, out_bias=bias,
                    mlp_bias=read.flag(False, "mlp_bias"), no_rope=without,
                    windows=read.windows(layers, window, types))


def mistral(read: Reader, architecture: str) -> ModelConfig:
    window = read.size(4096, INT32, "sliding_window", null=None)
    if window and "full_attention" in read.get(list, [], "layer_types", null=[]):
        read.refuse("layer_types", "a Mistral whose layers differ in their window", None)
    return _decoder(read, architecture, vocab=32000, inner=14336, kv_heads=8, max_position=131072, bos=1, eos=2,
                    windows=window)


def qwen2(read: Reader, architecture: str) -> ModelConfig:
    return _decoder(read, architecture, vocab=151936, inner=22016, kv_heads=32, max_position=32768, qkv_bias=True,
                    windows=_qwen_windows(read))


def qwen3(read: Reader, architecture: str) -> ModelConfig:
    bias = read.flag(False, "attention_bias")
    return _decoder(read, architecture, vocab=151936, inner=22016, kv_heads=32, max_position=32768, head_dim=128,
                    qkv_bias=bias, out_bias=bias, qk_norm=True, windows=_qwen_windows(read))


def _qwen_windows(read: Reader) -> tuple[int | None, ...]:
    layers = read.size(32, MAX_LAYERS, "num_hidden_layers")
    windowed = read.flag(False, "use_sliding_window")
    window = read.size(4096, INT32, "sliding_window", null=None) if windowed else None
    first = read.get(int, 28, "max_window_layers")
    return read.windows(layers, window, ["sliding_attention" if i >= first else "full_attention"
                                         for i in range(layers)])


def gemma2(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2408.00118."""
    return _gemma(read, architecture, vocab=256000, max_position=8192, every=2, attention_softcap=50.0,
                  logits_softcap=30.0)


def gemma3(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2503.19786."""
    every = read.size(6, INT32, "sliding_window_pattern", "_sliding_window_pattern")
    return _gemma(read, architecture, vocab=262208, max_position=131072, every=every, attention_softcap=None,
                  logits_softcap=None, theta=1e6, local_theta=1e4, qk_norm=True)


def _gemma(read: Reader, architecture: str, *, every: int, attention_softcap: float | None,
           logits_softcap: float | None, **features: Any) -> ModelConfig:
    """Of `every` layers the last one sees the whole context, and the others a window of it. Where attention goes in
    both directions, the window is divided between them."""
    layers, bias = read.size(26, MAX_LAYERS, "num_hidden_layers"), read.flag(False, "attention_bias")
    window = read.size(4096, INT32, "sliding_window", null=None)
    if read.flag(False, "use_bidirectional_attention"):
        window, features["causal"] = window and window // 2 + 1, False
    types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    hidden = read.size(2304, MAX_HIDDEN, "hidden_size")
    activation = read.get(str, "gelu_pytorch_tanh", "hidden_activation", null="gelu_pytorch_tanh")
    if activation not in _GELU:
        raise read.unusable("hidden_activation", activation, ", ".join(_GELU))
    return _decoder(read, architecture, inner=9216, kv_heads=4, hidden=2304, layers=26, heads=8, head_dim=256, bos=2,
                    eos=1, tied=True, silu=False, activation=_GELU[activation], qkv_bias=bias, out_bias=bias,
                    windows=read.windows(layers, window, types), embedding_scale=hidden ** 0.5,
                    attention_scale=read.number(256, 1e-6, 1e9, "query_pre_attn_scalar") ** -0.5,
                    attention_softcap=read.optional(1e-3, 1e9, "attn_logit_softcapping", attention_softcap),
                    logits_softcap=read.optional(1e-3, 1e9, "final_logit_softcapping", logits_softcap), **features)


def phi3(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2404.14219. Its first checkpoints call longrope "su" or "yarn"."""
    name = "rope_scaling" if read.data.get("rope_scaling") else "rope_parameters"
    params = read.get(dict, {}, name, null={})
    if params.get("rope_type", params.get("type")) in ("su", "yarn"):
        read = Reader({**read.data, name: {**params, "rope_type": "longrope"}}, read.file)
    if params and "original_max_position_embeddings" not in read.data:  # its own default comes before the parameters'
        read = Reader({**read.data, "original_max_position_embeddings": 4096}, read.file)
    return _decoder(read, architecture, vocab=32064, inner=8192, kv_heads=None, max_position=4096, hidden=3072, bos=1,
                    eos=32000, eps=1e-5, partial=1.0, windows=read.size(None, INT32, "sliding_window", null=None))


def olmo2(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2501.00656."""
    return _olmo(read, architecture)


def olmo3(read: Reader, architecture: str) -> ModelConfig:
    layers = read.size(32, MAX_LAYERS, "num_hidden_layers")
    types = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    window = read.size(4096, INT32, "sliding_window", null=None)
    return _olmo(read, architecture, theta=5e5, local_theta=0.0, windows=read.windows(layers, window, types))


def _olmo(read: Reader, architecture: str, **features: Any) -> ModelConfig:
    bias = read.flag(False, "attention_bias")
    return _decoder(read, architecture, vocab=50304, inner=11008, kv_heads=None, max_position=2048, eos=50279,
                    eps=1e-5, qkv_bias=bias, out_bias=bias, qk_norm=True, qk_norm_whole=True, **features)


def glm4(read: Reader, architecture: str) -> ModelConfig:
    return _decoder(read, architecture, vocab=151552, inner=13696, kv_heads=2, max_position=131072, layers=40,
                    head_dim=128, eos=(151329, 151336, 151338), eps=1.5625e-7, partial=0.5, interleaved=True,
                    qkv_bias=read.flag(True, "attention_bias"))


def mixtral(read: Reader, architecture: str) -> ModelConfig:
    layers, inner = read.size(32, MAX_LAYERS, "num_hidden_layers"), read.size(14336, MAX_INNER, "intermediate_size")
    experts = ExpertsConfig(count=read.size(8, MAX_EXPERTS, "num_local_experts"), size=inner,
                            per_token=read.size(2, MAX_EXPERTS, "num_experts_per_tok"), layers=tuple(range(layers)))
    return _decoder(read, architecture, vocab=32000, inner=14336, kv_heads=8, max_position=131072, bos=1, eos=2,
                    eps=1e-5, theta=1e6, experts=experts, windows=read.size(None, INT32, "sliding_window", null=None))


def qwen3_moe(read: Reader, architecture: str) -> ModelConfig:
    layers, bias = read.size(24, MAX_LAYERS, "num_hidden_layers"), read.flag(False, "attention_bias")
    every, dense = read.size(1, INT32, "decoder_sparse_step"), read.layers("mlp_only_layers", layers)
    experts = ExpertsConfig(
        count=read.size(128, MAX_EXPERTS, "num_local_experts", "num_experts"),
        per_token=read.size(8, MAX_EXPERTS, "num_experts_per_tok"), normalise=read.flag(False, "norm_topk_prob"),
        size=read.size(768, MAX_INNER, "moe_intermediate_size"),
        layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % every == 0))
    window = read.size(4096, INT32, "sliding_window", null=None) if read.flag(False, "use_sliding_window") else None
    return _decoder(read, architecture, vocab=151936, inner=6144, kv_heads=4, max_position=32768, hidden=2048,
                    layers=24, qkv_bias=bias, out_bias=bias, qk_norm=True, experts=experts, windows=window)


def qwen2_moe(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2407.10671."""
    layers, every = read.size(24, MAX_LAYERS, "num_hidden_layers"), read.size(1, INT32, "decoder_sparse_step")
    dense, windowed = read.layers("mlp_only_layers", layers), read.flag(False, "use_sliding_window")
    experts = ExpertsConfig(
        count=read.size(60, MAX_EXPERTS, "num_experts"), per_token=read.size(4, MAX_EXPERTS, "num_experts_per_tok"),
        normalise=read.flag(False, "norm_topk_prob"), size=read.size(1408, MAX_INNER, "moe_intermediate_size"),
        shared_size=read.size(5632, MAX_INNER, "shared_expert_intermediate_size"), shared_gate=True,
        layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % every == 0))
    window = read.size(4096, INT32, "sliding_window", null=None) if windowed else None
    last = read.get(int, 28, "max_window_layers")
    types = ["sliding_attention" if window and i % 2 == 0 and i < last else "full_attention" for i in range(layers)]
    return _decoder(read, architecture, vocab=151936, inner=5632, kv_heads=16, max_position=32768, hidden=2048,
                    layers=24, heads=16, qkv_bias=read.flag(True, "qkv_bias"), experts=experts,
                    windows=read.windows(layers, window, types))


def qwen3_next(read: Reader, architecture: str) -> ModelConfig:
    layers, every = read.size(48, MAX_LAYERS, "num_hidden_layers"), read.size(1, INT32, "decoder_sparse_step")
    dense = read.layers("mlp_only_layers", layers)
    experts = ExpertsConfig(
        count=read.size(512, MAX_EXPERTS, "num_experts"), per_token=read.size(10, MAX_EXPERTS, "num_experts_per_tok"),
        normalise=read.flag(True, "norm_topk_prob"), size=read.size(512, MAX_INNER, "moe_intermediate_size"),
        shared_size=read.size(512, MAX_INNER, "shared_expert_intermediate_size"), shared_gate=True,
        layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % every == 0))
    return _delta(read, architecture, layers, vocab=151936, inner=5632, kv_heads=2, hidden=2048, split=False,
                  experts=experts)


def qwen3_5(read: Reader, architecture: str) -> ModelConfig:
    """Its text alone, in which the three positions of a token are one."""
    layers = read.size(32, MAX_LAYERS, "num_hidden_layers")
    return _delta(read, architecture, layers, vocab=248320, inner=12288, kv_heads=4, hidden=4096, split=True)


def _delta(read: Reader, architecture: str, layers: int, *, split: bool, **features: Any) -> ModelConfig:
    """Of every so many layers the last one has attention, and the others a gated delta rule."""
    every, bias = read.size(4, MAX_LAYERS, "full_attention_interval"), read.flag(False, "attention_bias")
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    types = read.get(list, default, "layer_types", null=default)
    if len(types) != layers or not set(types) <= {"linear_attention", "full_attention"}:
        raise read.unusable("layer_types", types, f"{layers} entries, linear_attention or full_attention")
    heads, groups = (read.size(default, MAX_HEADS, f"linear_num_{name}_heads")
                     for name, default in (("value", 32), ("key", 16)))
    if heads % groups:
        raise read.unusable("linear_num_value_heads", heads, f"a multiple of linear_num_key_heads ({groups})")
    delta = DeltaConfig(
        layers=tuple(i for i, kind in enumerate(types) if kind == "linear_attention"), key_heads=groups,
        value_heads=heads, key_dim=read.size(128, MAX_HEAD_DIM, "linear_key_head_dim"), split=split,
        value_dim=read.size(128, MAX_HEAD_DIM, "linear_value_head_dim"),
        taps=read.size(4, MAX_HEAD_DIM, "linear_conv_kernel_dim"))
    return _decoder(read, architecture, max_position=32768, layers=layers, heads=16, head_dim=256, partial=0.25,
                    qkv_bias=bias, out_bias=bias, qk_norm=True, delta=delta, **features)


def gpt_oss(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2508.10925."""
    read.refuse("swiglu_alpha", "another factor in the activation of its experts", 1.702)
    layers, bias = read.size(36, MAX_LAYERS, "num_hidden_layers"), read.flag(True, "attention_bias")
    window = read.size(128, INT32, "sliding_window", null=None)
    experts = ExpertsConfig(
        count=read.size(128, MAX_EXPERTS, "num_local_experts", "num_experts"), layers=tuple(range(layers)),
        per_token=read.size(4, MAX_EXPERTS, "num_experts_per_tok", "experts_per_token"), bias=True,
        size=read.size(2880, MAX_INNER, "intermediate_size"), limit=read.number(7.0, 1e-3, 1e6, "swiglu_limit"))
    yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    return _decoder(read, architecture, vocab=201088, inner=2880, kv_heads=8, max_position=131072, hidden=2880,
                    layers=36, heads=64, head_dim=64, eps=1e-5, theta=150000.0, default_rope=yarn, qkv_bias=bias,
                    out_bias=bias, sinks=True, experts=experts, windows=read.windows(layers, window, [
                        "full_attention" if i % 2 else "sliding_attention" for i in range(layers)]))


def glm4_moe(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2508.06471."""
    layers = read.size(46, MAX_LAYERS, "num_hidden_layers")
    experts = _deepseek_experts(read, layers, count=128, size=1408, shared=1, scaling=1.0, groups=1, top_groups=1,
                                dense=1, sigmoid=True, normalise=read.flag(True, "norm_topk_prob"))
    return _decoder(read, architecture, vocab=151552, inner=10944, kv_heads=8, max_position=131072, layers=46, heads=96,
                    head_dim=128, eps=1e-5, partial=0.5, qkv_bias=read.flag(False, "attention_bias"),
                    qk_norm=read.flag(False, "use_qk_norm"), experts=experts, extra=_predicting(read))


def _predicting(read: Reader) -> dict[str, Any]:
    """The layers behind the last one, with which the model could predict further tokens."""
    count = read.get(int, 1, "num_nextn_predict_layers", null=0)
    if not 0 <= count <= MAX_LAYERS:
        raise read.unusable("num_nextn_predict_layers", count, f"an integer from 0 to {MAX_LAYERS}")
    return {"predicting_layers": count}


def deepseek_v2(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2405.04434."""
    method = read.get(str, "greedy", "topk_method", null="greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise read.unusable("topk_method", method, "greedy or group_limited_greedy")
    if method == "greedy":
        read = Reader({**read.data, "n_group": 1, "topk_group": 1}, read.file)
    layers = read.size(32, MAX_LAYERS, "num_hidden_layers")
    experts = _deepseek_experts(read, layers, count=64, size=1407, shared=2, scaling=1.0, groups=None, top_groups=None,
                                dense=0, sigmoid=False, normalise=False)
    return _latent(read, architecture, q_rank=1536, interleaved=True, experts=experts, vocab=102400, inner=11008,
                   kv_heads=None, max_position=2048, bos=1, eos=2, mlp_bias=read.flag(False, "mlp_bias"))


def deepseek_v3(read: Reader, architecture: str) -> ModelConfig:
    """Source: arXiv 2412.19437."""
    layers = read.size(61, MAX_LAYERS, "num_hidden_layers")
    experts = _deepseek_experts(read, layers, count=256, size=2048, shared=1, scaling=2.5, groups=8, top_groups=4,
                                dense=3, sigmoid=True, normalise=read.flag(True, "norm_topk_prob"))
    return _latent(read, architecture, q_rank=1536, interleaved=read.flag(True, "rope_interleave"), experts=experts,
                   vocab=129280, inner=18432, kv_heads=128, max_position=4096, hidden=7168, layers=61, heads=128, bos=0,
                   eos=1, extra=_predicting(read))


def _latent(read: Reader, architecture: str, *, q_rank: int, **features: Any) -> ModelConfig:
    """Attention over latents. With yarn its scale grows by the square of the factor that the extended context has on
    the scores."""
    read.refuse("attention_bias", "biases of attention over latents", False)
    rank = read.size(q_rank, MAX_HIDDEN, "q_lora_rank", null=None)
    plain, rotary, value = (read.size(size, MAX_HEAD_DIM, name) for size, name in (
        (128, "qk_nope_head_dim"), (64, "qk_rope_head_dim"), (128, "v_head_dim")))
    latent = LatentConfig(q_rank=rank or 0, kv_rank=read.size(512, MAX_HIDDEN, "kv_lora_rank"), plain_dim=plain,
                          value_dim=value)
    params = read.get(dict, {}, "rope_scaling", null={}) or read.get(dict, {}, "rope_parameters", null={})
    rope, scale = Reader(params, read.file), (plain + rotary) ** -0.5
    if rope.get(str, "default", "rope_type", "type") != "default":
        by = 0.1 * (rope.optional(1e-6, 1e6, "mscale_all_dim") or 0.0)
        scale *= (1.0 + by * log(rope.number(1.0, 1.0, 1e6, "factor"))) ** 2
    return _decoder(Reader({**read.data, "head_dim": rotary}, read.file), architecture, latent=latent,
                    attention_scale=scale, **features)


def _deepseek_experts(read: Reader, layers: int, *, count: int, size: int, shared: int, scaling: float,
                      groups: int | None, top_groups: int | None, dense: int, sigmoid: bool, normalise: bool,
                      ) -> ExpertsConfig:
    """The experts as DeepSeek configures them; the arguments are the architecture's own defaults."""
    size = read.size(size, MAX_INNER, "moe_intermediate_size")
    first = read.get(int, dense, "first_k_dense_replace", null=0)
    if first < 0:
        raise read.unusable("first_k_dense_replace", first, "at least 0")
    return ExpertsConfig(
        count=read.size(count, MAX_EXPERTS, "n_routed_experts"), size=size, layers=tuple(range(first, layers)),
        per_token=read.size(8, MAX_EXPERTS, "num_experts_per_tok", null=1), normalise=normalise, sigmoid=sigmoid,
        groups=read.size(groups, MAX_EXPERTS, "n_group", null=None) or 1, wide=True,
        top_groups=read.size(top_groups, MAX_EXPERTS, "topk_group", null=None) or 1,
        scaling=read.number(scaling, 1e-6, 1e6, "routed_scaling_factor"),
        shared_size=size * (read.size(shared, MAX_EXPERTS, "n_shared_experts", null=None) or 0))


def _decoder(read: Reader, architecture: str, *, vocab: int, inner: int, kv_heads: int | None, max_position: int,
             hidden: int = 4096, layers: int = 32, heads: int = 32, head_dim: int | None = None, bos: int | None = None,
             eos: int | tuple[int, ...] | None = None, eps: float = 1e-6, tied: bool = False, silu: bool = True,
             theta: float = 10000.0, local_theta: float | None = None, partial: float | None = None,
             interleaved: bool = False, default_rope: dict[str, Any] | None = None,
             windows: int | tuple[int | None, ...] | None = None, **features: Any) -> ModelConfig:
    """The configuration of a Llama-like model; the arguments are the architecture's own defaults and features.
    `windows`: of each layer, or one for all of them."""
    if silu and read.get(str, "silu", "hidden_act") not in ("silu", "swish"):
        read.refuse("hidden_act", "another activation than silu", "silu")
    hidden = read.size(hidden, MAX_HIDDEN, "hidden_size")
    layers = read.size(layers, MAX_LAYERS, "num_hidden_layers")
    heads = read.size(heads, MAX_HEADS, "num_attention_heads")
    positions = read.size(max_position, MAX_POSITIONS, "max_position_embeddings")
    own = read.size(head_dim, MAX_HEAD_DIM, "head_dim", null=None)
    if own is None and hidden % heads:
        raise ModelLoadError("num_attention_heads does not divide hidden_size", got=f"{heads} and {hidden}",
                             hint="config.json must then give head_dim")
    dim = own or hidden // heads
    rope, local = read.ropes(positions, dim, theta=theta, local_theta=local_theta, partial=partial,
                             interleaved=interleaved, default=default_rope)
    return ModelConfig(
        family="llama", architecture=architecture, vocab_size=read.size(vocab, MAX_VOCAB, "vocab_size"),
        hidden_size=hidden, num_layers=layers, num_heads=heads, head_dim=dim,
        num_kv_heads=read.size(kv_heads, MAX_HEADS, "num_key_value_heads", null=heads) or heads,
        intermediate_size=read.size(inner, MAX_INNER, "intermediate_size"), max_position=positions,
        norm_eps=read.eps(eps, "rms_norm_eps"), rope=rope, local_rope=None if local == rope else local,
        windows=windows if isinstance(windows, tuple) else (windows,) * layers,
        tie_embeddings=read.get(bool, tied, "tie_word_embeddings"), bos_token_id=read.bos(bos),
        eos_token_ids=read.eos(eos), dtype=read.dtype(), **features)


def gpt2(read: Reader, architecture: str) -> ModelConfig:
    read.refuse("add_cross_attention", "cross attention", False)
    read.refuse("scale_attn_weights", "unscaled attention", True)
    read.refuse("scale_attn_by_inverse_layer_idx", "attention scaled by the layer's number", False)
    act = read.get(str, "gelu_new", "activation_function")
    if act not in _GELU:
        raise ModelLoadError("config.json asks for an activation that is not supported", got=shown(act),
                             expected=", ".join(_GELU))
    hidden = read.size(768, MAX_HIDDEN, "n_embd", "hidden_size")
    layers = read.size(12, MAX_LAYERS, "n_layer", "num_hidden_layers")
    heads = read.size(12, MAX_HEADS, "n_head", "num_attention_heads")
    if hidden % heads:
        raise ModelLoadError("n_head does not divide n_embd", got=f"{hidden} and {heads}")
    return ModelConfig(
        family="gpt2", architecture=architecture, vocab_size=read.size(50257, MAX_VOCAB, "vocab_size"),
        hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads,
        intermediate_size=read.size(4 * hidden, MAX_INNER, "n_inner", null=4 * hidden),
        max_position=read.size(1024, MAX_POSITIONS, "n_positions", "max_position_embeddings"),
        norm_eps=read.eps(1e-5, "layer_norm_epsilon"), activation=_GELU[act], gated=False,  # type: ignore[arg-type]
        embedding_name="wte", windows=(None,) * layers, tie_embeddings=read.get(bool, True, "tie_word_embeddings"),
        qkv_bias=True, out_bias=True, mlp_bias=True, bos_token_id=read.bos(50256), eos_token_ids=read.eos(50256),
        dtype=read.dtype())


def bert(read: Reader, architecture: str) -> ModelConfig:
    """An encoder (arXiv 1810.04805)."""
    return _encoder(read, architecture, vocab=30522, pad=None)


def roberta(read: Reader, architecture: str) -> ModelConfig:
    """Positions begin behind the padding token's id (arXiv 1907.11692)."""
    return _encoder(read, architecture, vocab=50265, pad=1)


def xlm_roberta(read: Reader, architecture: str) -> ModelConfig:
    return _encoder(read, architecture, vocab=30522, pad=1)


def _encoder(read: Reader, architecture: str, *, vocab: int, pad: int | None) -> ModelConfig:
    """`pad`: the default of pad_token_id where positions count from it; None: they count from 0."""
    read.refuse("is_decoder", "an encoder that is used as a decoder", False)
    read.refuse("add_cross_attention", "cross attention", False)
    read.refuse("position_embedding_type", "positions relative to each other", "absolute")
    act = read.get(str, "gelu", "hidden_act")
    if act not in _GELU:
        raise read.unusable("hidden_act", act, ", ".join(_GELU))
    hidden, heads = read.size(768, MAX_HIDDEN, "hidden_size"), read.size(12, MAX_HEADS, "num_attention_heads")
    if hidden % heads:
        raise ModelLoadError("num_attention_heads does not divide hidden_size", got=f"{heads} and {hidden}")
    layers, rows = (read.size(default, most, name) for default, most, name in (
        (12, MAX_LAYERS, "num_hidden_layers"), (512, MAX_POSITIONS, "max_position_embeddings")))
    first = 0 if pad is None else read.get(int, pad, "pad_token_id") + 1
    if not 0 <= first < rows:
        raise read.unusable("pad_token_id", first - 1, f"an integer from 0 to {rows - 2}")
    return ModelConfig(
        family="bert", architecture=architecture, vocab_size=read.size(vocab, MAX_VOCAB, "vocab_size"),
        hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads,
        intermediate_size=read.size(3072, MAX_INNER, "intermediate_size"), max_position=rows - first, causal=False,
        norm_eps=read.eps(1e-12, "layer_norm_eps"), activation=_GELU[act], gated=False,  # type: ignore[arg-type]
        embedding_name="embeddings.word_embeddings", windows=(None,) * layers, qkv_bias=True, out_bias=True,
        mlp_bias=True, dtype=read.dtype(),
        extra={"first_position": first, "token_types": read.size(2, INT32, "type_vocab_size")})
