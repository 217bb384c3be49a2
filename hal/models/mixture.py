"""Families of decoders whose layers have a mixture of experts in place of the MLP."""

from __future__ import annotations

from torch import nn

from hal.contracts.attention import AttentionSpec
from hal.contracts.cache import LayerCache
from hal.model_config import ModelConfig
from hal.models.decoder import Decoder
from hal.models.experts import ExpertNames, Experts
from hal.models.latent import LatentAttention
from hal.models.layers import Build


class MixtureDecoder(Decoder):
    """A decoder of whose layers some have experts. GLM-4-MoE (arXiv 2508.06471) has nothing else of its own.

    Attributes:
        block: name of a layer's experts in the checkpoint.
    """

    block, names = "mlp", ExpertNames()

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        # Layers behind the last one predict further tokens, which this definition does not do.
        more = (config.extra or {}).get("predicting_layers", 0)
        self.ignored = tuple(f"layers.{config.num_layers + i}." for i in range(more))

    def make_mlp(self, build: Build, index: int) -> nn.Module:
        experts = self.config.experts
        if experts is None or index not in experts.layers:
            return super().make_mlp(build, index)
        return Experts(self.config, build, f"layers.{index}.{self.block}", self.names)


class QwenMoe(MixtureDecoder):
    """Qwen2-MoE and Qwen3-MoE. Sources: arXiv 2407.10671, 2505.09388."""

    names = ExpertNames(shared="shared_expert")


class Mixtral(MixtureDecoder):
    """Source: arXiv 2401.04088."""

    block, names = "block_sparse_moe", ExpertNames(parts=("w1", "w3", "w2"))


class GptOss(MixtureDecoder):
    """Source: arXiv 2508.10925."""

    names = ExpertNames(router="router", parts=None)


class DeepSeek(MixtureDecoder):
    """DeepSeek V2 and V3. Sources: arXiv 2405.04434, 2412.19437."""

    def declare_caches(self, build: Build) -> list[LayerCache]:
        """Every rank caches the latent vectors and the rotary keys, since all heads share them."""
        c, a = self.config, self.config.latent
        assert a is not None
        spec = AttentionSpec(c.num_heads // self.topology.tp, 1, a.kv_rank + c.head_dim, c.attention_scale,
                             value_dim=a.kv_rank, values_in_keys=True)
        return [spec] * c.num_layers

    def make_attention(self, build: Build, index: int) -> LatentAttention:
        rope = self.config.layer_rope(index)
        assert rope is not None
        return LatentAttention(self.config, build, f"layers.{index}.self_attn", rope, self.ropes.index(rope))
