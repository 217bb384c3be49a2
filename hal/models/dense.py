"""Families of dense decoders that differ from Llama in their norms or in how their weights are stored."""

from __future__ import annotations

import torch

from hal.models.decoder import Decoder, Norms

SANDWICH = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                 "post_feedforward_layernorm")


class Gemma(Decoder):
    """Gemma 2 and 3 (text). Sources: arXiv 2408.00118, 2503.19786."""

    norms = SANDWICH
    norm = {"dtype": torch.float32, "added": 1.0}


class Phi3(Decoder):
    """Phi-3 and Phi-4. Sources: arXiv 2404.14219, 2503.01743."""

    fused_qkv = fused_mlp = True


class Olmo(Decoder):
    """OLMo 2 and 3: norms of the outputs alone. Source: arXiv 2501.00656."""

    norms = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    norm = {"dtype": torch.float32}


class Glm4(Decoder):
    """GLM-4 (0414)."""

    norms = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    fused_mlp = True
