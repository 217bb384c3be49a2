"""A model's shape, device-neutral and torch-free. `hal.checkpoints.hf_config` reads it from a config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ModelImpl = Literal["auto", "native", "transformers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding, half-split (NeoX) layout over the whole head. Source: RoFormer, arXiv 2104.09864.

    Attributes:
        theta: the base of the frequencies.
        scaling: how the frequencies are changed for long contexts: "none"; "linear" divides positions by `factor`;
            "llama3" has the frequency bands of Llama 3.1; "dynamic" is NTK.
        low_freq_factor, high_freq_factor, original_max_position: parameters of "llama3".
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3", "dynamic"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleConfig:
    """What an EAGLE-3 head has beside a decoder layer. Source: arXiv 2503.01840.

    Attributes:
        draft_vocab_size: tokens that the head can propose, at most the target's vocabulary.
        target_hidden_size: of the target model.
        taps: the target's layers whose inputs the head reads, low to high; empty where config.json leaves them to the
            target's depth.
        own_embeddings: the checkpoint has an embedding table; otherwise the head uses the target's.
        norm_before_residual: the residual of the layer is the normed hidden state.
    """

    draft_vocab_size: int
    target_hidden_size: int
    taps: tuple[int, ...] = ()
    own_embeddings: bool = False
    norm_before_residual: bool = False

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The taps in a target of so many layers. Without `taps` they are those with which the published heads were
        trained: the inputs of the third layer, of the middle one and of the third from the end."""
        return self.taps or (2, num_layers // 2, num_layers - 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Attributes:
        family: the definition in hal.models that runs the model.
        architecture: the name that config.json gives.
        embedding_name: of the embedding table in a checkpoint, without ".weight" and without the prefix "model." or
            "transformer.".
        tie_embeddings: the output head and the embeddings are one table.
        windows: sliding window of each layer in tokens (the query's own included), None where attention is full.
        activation: of the MLP; "silu" means gated (SwiGLU).
        qkv_bias, out_bias, mlp_bias: biases of q/k/v, of the attention output, and of the MLP projections.
        qk_norm: RMSNorm over each head's q and k before the rotary embedding (Qwen3).
        dtype: the checkpoint's, as "bfloat16", "float16" or "float32".
        source: the content of config.json where the Transformers backend runs the model (docs/models.md); None where a
            definition of hal.models does. code: the directory whose own Python code is the model's; None: the code is
            that of transformers.
        quantization: the quantization_config of config.json, whose quant_method names a format of hal.weights; None
            where the weights are dense.
        eagle: of a head that proposes tokens for another model; None for a model by itself.
    """

    family: Literal["llama", "gpt2", "eagle3", "transformers"]
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    quantization: dict[str, Any] | None = None
    eagle: EagleConfig | None = None
    embedding_name: str = "embed_tokens"
    source: dict[str, Any] | None = None
    code: str | None = None

    @property
    def num_params(self) -> int:
        """The number of weights in decoder layers, embeddings and head. Norms and biases are not counted."""
        qkvo = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = (3 if self.activation == "silu" else 2) * self.hidden_size * self.intermediate_size
        embed = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * (qkvo + mlp) + embed

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of dataclasses.asdict, also after a trip through JSON."""
        rope, eagle = data.get("rope"), data.get("eagle")
        head = EagleConfig(**{**eagle, "taps": tuple(eagle["taps"])}) if eagle else None
        return cls(**{**data, "rope": RopeConfig(**rope) if rope else None, "windows": tuple(data["windows"]),
                      "eos_token_ids": tuple(data["eos_token_ids"]), "eagle": head})
