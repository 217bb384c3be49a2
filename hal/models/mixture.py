"""Families of decoders whose layers have a mixture of experts in place of the MLP."""

from __future__ import annotations

from torch import nn

from hal.models.decoder import Decoder
from hal.models.experts import ExpertNames, Experts
from hal.models.layers import Build


class MixtureDecoder(Decoder):
    """A decoder of whose layers some have experts. GLM-4-MoE (arXiv 2508.06471) has nothing else of its own.

    Attributes:
        block: name of a layer's experts in the checkpoint.
    """

    block, names = "mlp", ExpertNames()

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
