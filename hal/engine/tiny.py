"""A checkpoint of an architecture in small: random weights, and every window and chunk shorter than the prompts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from hal.errors import ConfigError

VOCAB, LAYERS, SHORT = 96, 4, 8  # SHORT: of windows, chunks and sparse selections
# Sizes by the names that configurations of transformers give them.
_SIZES = (
    (64, "dim_model_base hidden_size n_embd d_model word_embed_proj_dim embedding_size attention_hidden_size"),
    (96, "intermediate_size ffn_dim n_inner ffn_hidden_size intermediate_size_mlp ffn_size dense_ffn_hidden_size "
        "shared_intermediate_size prefix_dense_intermediate_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers"),
    (4, "num_attention_heads n_head n_heads num_experts n_routed_experts num_local_experts moe_num_experts "
       "linear_num_value_heads mamba_n_heads num_linear_key_value_heads"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts "
       "linear_num_key_heads num_global_key_value_heads index_n_heads"),
    (16, "head_dim kv_lora_rank qk_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state "
        "index_head_dim global_head_dim query_pre_attn_scalar attention_head_dim attention_key_value_head_dim"),
    (24, "q_lora_rank"), (8, "qk_rope_head_dim qk_nope_head_dim hidden_size_per_layer_input"),
    (32, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_head "
        "moe_shared_expert_intermediate_size"),
    (256, "max_position_embeddings n_positions max_sequence_length max_seq_len seq_length"),
    (VOCAB, "vocab_size vocab_size_per_layer_input"),
    (1, "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts moe_layer_start_index "
        "scale_emb"),
    (0, "pad_token_id num_nextn_predict_layers zero_expert_num"),
    (SHORT, "sliding_window attention_window_size attention_chunk_size index_topk local_attention window_size"),
)
SIZES = {name: size for size, names in _SIZES for name in names.split()}
# Kinds of layers whose checkpoints have both, and whose configuration alone has one or none.
_LAYER_TYPES = {"lfm2": ["conv", "full_attention"], "lfm2_moe": ["conv", "full_attention"],
                "granitemoehybrid": ["mamba", "attention"]}
_KEPT_NULL = ("pad_token_id", "sliding_window", "q_lora_rank", "num_global_key_value_heads", "attention_chunk_size")


def tiny_config(kind: str, source: dict[str, Any] | None = None) -> Any:
    """Transformers' configuration of an architecture in small, with the options of `source` (config.json) or of none.

    Raises:
        ConfigError: transformers has no such architecture, or its configuration cannot be made small.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    log: Any = transformers.utils.logging
    log.set_verbosity_error()  # a small configuration contradicts itself here and there
    if kind not in CONFIG_MAPPING:
        raise ConfigError("transformers has no architecture of this type", got=kind)
    try:
        make: Any = CONFIG_MAPPING[kind]
        full = make.from_dict(dict(source)) if source else make()
        if parts := set(getattr(full, "sub_configs", None) or ()) - {"attn_config", "ffn_config"}:
            raise ConfigError("its checkpoints hold more than a decoder of text", got=", ".join(sorted(parts)),
                              hint="its text part has a type of its own")
        values = full.to_dict()
        small: dict[str, Any] = {name: size for name, size in SIZES.items() if _may_change(full, name)}
        if "qk_rope_head_dim" in small and getattr(full, "head_dim", None) == full.qk_rope_head_dim:
            small["head_dim"] = small["qk_rope_head_dim"]
        if "kv_lora_rank" in small and "num_key_value_heads" in small:  # keys are expanded to all heads
            small["num_key_value_heads"] = small["num_attention_heads"]
        if getattr(full, "num_kv_shared_layers", 0):
            small["num_kv_shared_layers"] = LAYERS // 2  # one of each of two types
        layers = getattr(full, "num_hidden_layers", 0)
        for name, value in values.items():
            if isinstance(value, list) and value and (len(value) == layers or name == "layer_types"):
                small[name] = (list(dict.fromkeys(value)) * LAYERS)[:LAYERS]
        small |= {"bos_token_id": 1, "eos_token_id": 2}
        if source:
            return make.from_dict({**source, **small})
        if kind in _LAYER_TYPES:
            small["layer_types"] = (_LAYER_TYPES[kind] * LAYERS)[:LAYERS]
        if hasattr(full, "is_decoder"):  # otherwise attention is in both directions
            small["is_decoder"] = True
        try:
            return make(**small)
        except Exception:
            return make(**{n: v for n, v in small.items() if not isinstance(v, list)})
    except ConfigError:
        raise
    except Exception as error:  # the configuration class of any architecture
        raise ConfigError("this architecture's configuration cannot be made small", got=f"{kind}: {_said(error)}",
                          hint="hal certify builds a small model to compare with") from error


def _may_change(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        value = getattr(config, name)
    except AttributeError:
        return False
    except Exception:  # sizes that differ between layers, which become equal here
        return True
    return not (isinstance(value, (list, tuple, dict, str)) or (value is None and name in _KEPT_NULL))


def save_tiny(config: Any, directory: Path, seed: int = 0) -> Any:
    """Write a checkpoint of random fp32 weights whose scale makes greedy choices clear.

    Returns:
        Transformers' own model of these weights in fp64, attention written out.

    Raises:
        ConfigError: transformers cannot make it, or it is not small.
    """
    import transformers

    try:
        make: Any = transformers.AutoModelForCausalLM.from_config
        try:
            model = make(copy.deepcopy(config), attn_implementation="eager", experts_implementation="eager",
                         dtype=torch.float32)
        except ValueError as error:
            if "experts implementation" not in str(error):
                raise
            model = make(config, attn_implementation="eager", dtype=torch.float32)
    except Exception as error:
        raise ConfigError("transformers cannot build this architecture in small", got=_said(error)) from error
    if (count := sum(p.numel() for p in model.parameters())) > 80e6:
        raise ConfigError("this architecture's configuration cannot be made small", got=f"{count / 1e6:.0f} M weights",
                          expected="at most 80 M")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0.0, p.shape[-1] ** -0.5 if "embed" not in name else 0.25, generator=generator)
            else:  # about the value that the architecture begins with, which of norms is 0 or 1
                p.add_(torch.empty_like(p).uniform_(-0.3, 0.3, generator=generator))
    log: Any = transformers.utils.logging
    log.disable_progress_bar()
    model.save_pretrained(directory)
    return model.double().eval()


def _said(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said:.200}"
