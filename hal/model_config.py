"""A model's shape, device-neutral and torch-free. `hal.checkpoints.hf_config` reads it from a config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ModelImpl = Literal["auto", "native", "transformers"]
PoolingKind = Literal["cls", "mean", "mean_sqrt", "max", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of queries and keys. Source: RoFormer, arXiv 2104.09864.

    Attributes:
        theta: the base of the frequencies.
        scaling: how the frequencies are changed for long contexts: "none"; "linear" divides positions by `factor`;
            "llama3" has the frequency bands of Llama 3.1; "dynamic" is NTK; "yarn" (arXiv 2309.00071) mixes the two of
            them by the number of turns; "longrope" (arXiv 2402.13753) divides each frequency by a factor of its own.
        original_max_position: the context that the model was first trained for ("llama3", "yarn", "longrope").
        low_freq_factor, high_freq_factor: parameters of "llama3".
        beta_fast, beta_slow, truncate: the turns between which "yarn" mixes, and whether it rounds to whole dimensions.
        short_factors, long_factors: of "longrope", rotary_dim / 2 each. The long ones are used where the engine's
            longest sequence exceeds original_max_position.
        attention_factor: multiplies the cosines and sines.
        rotary_dim: so many first entries of a head are rotated, and the others stay; 0: all of them.
        interleaved: the entries 2i and 2i + 1 are a pair (GLM-4), not i and i + rotary_dim / 2.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3", "dynamic", "yarn", "longrope"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    rotary_dim: int = 0
    interleaved: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RopeConfig:
        return cls(**{**data, "short_factors": tuple(data["short_factors"]),
                      "long_factors": tuple(data["long_factors"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of a layer's MLP. Source: arXiv 2101.03961, 2401.04088 (Mixtral).

    Attributes:
        count, per_token: experts of a layer, and how many of them compute a token. size: of an expert's inner layer.
        layers: the layers that have experts; the others have an MLP.
        normalise: the weights of a token's experts are made to sum to one. They are a softmax over all experts, which
            with this is one over the chosen experts.
        sigmoid: the weights are sigmoids instead, and a stored correction is added to them for the choice alone
            (arXiv 2412.19437). wide: the router computes in fp32.
        groups, top_groups: experts come from the best groups alone. A group's score is its best weight, with `sigmoid`
            the sum of its best two.
        scaling: multiplies the weights.
        bias: router and experts have biases.
        limit: the gate and the other factor are clamped to it, SiLU is x * sigmoid(1.702 x), and one is added to the
            other factor (gpt-oss); None: SiLU.
        shared_size: of the inner layer of an MLP that computes every token beside its experts; 0: there is none.
        shared_gate: a sigmoid for each token multiplies the output of that MLP.
    """

    count: int
    per_token: int
    size: int
    layers: tuple[int, ...]
    normalise: bool = True
    sigmoid: bool = False
    wide: bool = False
    groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0
    bias: bool = False
    limit: float | None = None
    shared_size: int = 0
    shared_gate: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExpertsConfig:
        return cls(**{**data, "layers": tuple(data["layers"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """A linear layer between the pooled vector and the embedding.

    Attributes:
        folder: below the checkpoint directory, with the layer's weights in model.safetensors.
    """

    folder: str
    in_size: int
    out_size: int
    bias: bool
    activation: Literal["identity", "tanh", "relu", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingConfig:
    """How the hidden states of a text become its embedding.

    Attributes:
        pooling: the pooled vector is the hidden state of the first token ("cls") or of the last one, or the mean or the
            maximum over all tokens; "mean_sqrt" divides the sum by the square root of their number.
        dense: layers behind the pooling, in order. normalise: the result is divided by its Euclidean norm.
        max_length: tokens of a text, special tokens included. A longer text is cut.
        prompts: texts that are put before a text, by name. default_prompt: the name of the one that is used where the
            caller names none; None: none is used.
        strip, lower_case: what is done to a text before it is tokenised.
    """

    pooling: PoolingKind
    max_length: int
    normalise: bool = True
    dense: tuple[DenseConfig, ...] = ()
    prompts: dict[str, str]
    default_prompt: str | None = None
    strip: bool = False
    lower_case: bool = False

    def dim(self, hidden_size: int) -> int:
        """Entries of an embedding, of a model with hidden states of this size."""
        return self.dense[-1].out_size if self.dense else hidden_size

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EmbeddingConfig:
        return cls(**{**data, "dense": tuple(DenseConfig(**layer) for layer in data["dense"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Attention over a latent vector of each token, from which keys and values of all heads follow (arXiv 2405.04434).
    ModelConfig.head_dim is then the size of the rotary part of a query, and of the rotary key that all heads share.

    Attributes:
        q_rank: of the projection that queries come from; 0: they come from the hidden state. kv_rank: of the latent.
        plain_dim: size of the part of a query without rotary embedding. value_dim: size of a head's value.
    """

    q_rank: int
    kv_rank: int
    plain_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig:
    """Layers with a gated delta rule in place of attention, which keep a state per row (arXiv 2412.06464).

    Attributes:
        layers: the layers that have it; the others have attention, whose output a sigmoid of a projection multiplies.
        key_heads, value_heads: heads of queries and of keys, and of values; each of the first serves as many of the
            second. key_dim, value_dim: sizes of a head.
        taps: tokens that the convolution before the rule sees, a token's own included.
        split: the checkpoint stores the projections of q, k and v, of the gate and of the two coefficients apart
            (Qwen3.5), not side by side for each key head (Qwen3-Next).
    """

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    split: bool

    @property
    def keys(self) -> int:
        """Entries of the keys of all heads."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Entries of the values of all heads."""
        return self.value_heads * self.value_dim

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DeltaConfig:
        return cls(**{**data, "layers": tuple(data["layers"])})


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
        family: the kind of definition that runs the model. "llama": a Decoder or another one that hal.models.families
            names for the architecture.
        architecture: the name that config.json gives.
        embedding_name: of the embedding table in a checkpoint, without ".weight" and without the prefix "model." or
            "transformer.".
        tie_embeddings: the output head and the embeddings are one table.
        windows: sliding window of each layer in tokens (the query's own included), None where attention is full.
        rope: the rotary embedding; None: there is none. local_rope: that of the layers with a window, where it differs.
        no_rope: the layers without rotary embedding.
        activation: of the MLP. gated: the MLP multiplies the activation of one projection by another (SwiGLU).
        qkv_bias, out_bias, mlp_bias: biases of q/k/v, of the attention output, and of the MLP projections.
        qk_norm: RMSNorm of q and k before the rotary embedding, over each head, or with qk_norm_whole over all heads.
        attention_scale: multiplies q·k; 0: head_dim ** -0.5. attention_softcap, logits_softcap: scores and logits x
            become softcap * tanh(x / softcap).
        sinks: each head has a learned score that takes part in the softmax and adds no value.
        embedding_scale: multiplies the embeddings.
        experts: of the layers that have a mixture of experts. latent: of models whose attention is over latents.
        delta: of models of which some layers have a delta rule in place of attention.
        dtype: the checkpoint's, as "bfloat16", "float16" or "float32".
        source: the content of config.json where the Transformers backend runs the model (docs/transformers.md); None
            where a definition of hal.models does. code: the directory whose own Python code is the model's; None: the
            code is that of transformers.
        quantization: the quantization_config of config.json, whose quant_method names a format of hal.weights; None
            where the weights are dense.
        eagle: of a head that proposes tokens for another model; None for a model by itself.
        causal: a token sees the tokens before it alone; False: all tokens of its text.
        embedding: of a model that turns texts into vectors, and so has no head; None for a model that generates.
        extra: what only a family's own definition reads.
    """

    family: Literal["llama", "gpt2", "bert", "eagle3", "transformers"]
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
    gated: bool = True
    embedding_name: str = "embed_tokens"
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    no_rope: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_scale: float = 0.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    sinks: bool = False
    embedding_scale: float = 1.0
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    delta: DeltaConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    quantization: dict[str, Any] | None = None
    eagle: EagleConfig | None = None
    causal: bool = True
    embedding: EmbeddingConfig | None = None
    source: dict[str, Any] | None = None
    code: str | None = None
    extra: dict[str, Any] | None = None

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer."""
        if layer in self.no_rope:
            return None
        local = self.local_rope is not None and self.windows[layer] is not None
        return self.local_rope if local else self.rope

    @property
    def num_params(self) -> int:
        """The number of weights in decoder layers, embeddings and head. Norms and biases are not counted."""
        return self._params(self.experts.count if self.experts else 0)

    @property
    def num_active_params(self) -> int:
        """The number of weights that compute one token; the embeddings and the head are counted whole."""
        return self._params(self.experts.per_token if self.experts else 0)

    @property
    def kv_entries(self) -> int:
        """Values that the cache of a layer stores for a token, over all ranks if each stores its own."""
        if self.latent is not None:
            return self.latent.kv_rank + self.head_dim
        return 2 * self.num_kv_heads * self.head_dim

    def _params(self, experts_used: int) -> int:
        qkvo = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        if (a := self.latent) is not None:
            query = self.num_heads * (a.plain_dim + self.head_dim)
            qkvo = ((self.hidden_size + query) * a.q_rank if a.q_rank else self.hidden_size * query) + (
                self.hidden_size * (a.kv_rank + self.head_dim + self.num_heads * a.value_dim)
                + a.kv_rank * self.num_heads * (a.plain_dim + a.value_dim))
        mlp = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        embed = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings or self.embedding else 2)
        mixing = self.num_layers * qkvo
        if (d := self.delta) is not None:
            gates = (self.num_layers - len(d.layers)) * self.num_heads * self.head_dim * self.hidden_size
            rule = self.hidden_size * (2 * d.keys + 3 * d.values + 2 * d.value_heads)
            mixing += gates + len(d.layers) * (rule - qkvo)
        if (e := self.experts) is None:
            return mixing + self.num_layers * mlp + embed
        mixture = self.hidden_size * (e.count + 3 * (experts_used * e.size + e.shared_size))
        dense = (self.num_layers - len(e.layers)) * mlp
        return mixing + dense + len(e.layers) * mixture + embed

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of dataclasses.asdict, also after a trip through JSON."""
        made: dict[str, Any] = {name: tuple(data[name]) for name in ("windows", "no_rope", "eos_token_ids")}
        made |= {name: RopeConfig.from_dict(data[name]) if data[name] else None for name in ("rope", "local_rope")}
        made["experts"] = ExpertsConfig.from_dict(data["experts"]) if data["experts"] else None
        made["latent"] = LatentConfig(**data["latent"]) if data.get("latent") else None
        made["delta"] = DeltaConfig.from_dict(data["delta"]) if data.get("delta") else None
        eagle = data.get("eagle")
        made["eagle"] = EagleConfig(**{**eagle, "taps": tuple(eagle["taps"])}) if eagle else None
        embedding = data.get("embedding")
        made["embedding"] = EmbeddingConfig.from_dict(embedding) if embedding else None
        return cls(**{**data, **made})
