"""EAGLE-3: a head of one decoder layer that proposes the tokens of a target model. Source: arXiv 2503.01840.

At place i of a sequence the head reads the token at i + 1 and hidden states that the target computed at i, and its
logits are for the token at i + 2. For further tokens it reads its own last output in place of the target's states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hal.contracts.attention import ForwardContext
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig
from hal.models.attention import local_heads
from hal.models.causal_lm import CausalLM
from hal.models.layers import Build, column, row
from hal.models.rope import cos_sin_table
from hal.weights import Projection
from hal.weights.sharding import ParameterSpec, StoredSlice


class Eagle3(CausalLM):
    """Attributes:
        embed: the head's own table. Where the checkpoint has none, whoever builds the head sets the target's.
    """

    intermediates = ("hidden_states",)

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        c, eagle, name = config, config.eagle, "midlayer"
        assert eagle is not None and c.rope is not None
        self.eps, self.head_dim, self.norm_before_residual = c.norm_eps, c.head_dim, eagle.norm_before_residual
        self.heads, self.kv_heads = local_heads(c, build.topology.tp)
        self.fc = build.replicated("fc.weight", c.hidden_size, 3 * eagle.target_hidden_size)
        self.embed_norm = build.replicated(f"{name}.input_layernorm.weight", c.hidden_size)
        self.hidden_norm = build.replicated(f"{name}.hidden_norm.weight", c.hidden_size)
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.qkv = column(build, 2 * c.hidden_size, (Projection(f"{name}.self_attn.q_proj", q, c.num_heads),
                                                     Projection(f"{name}.self_attn.k_proj", kv, c.num_kv_heads),
                                                     Projection(f"{name}.self_attn.v_proj", kv, c.num_kv_heads)),
                          bias=c.qkv_bias)
        self.out = row(build, f"{name}.self_attn.o_proj", q, c.hidden_size, bias=c.out_bias)
        self.mlp_norm = build.replicated(f"{name}.post_attention_layernorm.weight", c.hidden_size)
        self.gate_up = column(build, c.hidden_size, (Projection(f"{name}.mlp.gate_proj", c.intermediate_size),
                                                     Projection(f"{name}.mlp.up_proj", c.intermediate_size)),
                              bias=c.mlp_bias)
        self.down = row(build, f"{name}.mlp.down_proj", c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.norm = build.replicated("norm.weight", c.hidden_size)
        table = cos_sin_table(c.rope, c.head_dim, c.max_position, build.device)
        self.register_buffer("rope_table", table, persistent=False)
        # d2t[i] is what is added to the draft token id i to give the target's, and t2d says which tokens have a draft
        # id. The draft ids are in the target's order, which bounds the difference.
        left, self.offsets = c.vocab_size - eagle.draft_vocab_size, None
        self.ignored = ("t2d",) if left else ("t2d", "d2t")
        if left:
            source = StoredSlice("d2t", (eagle.draft_vocab_size,), 0, eagle.draft_vocab_size)
            self.offsets = build.parameter(source.shape, ParameterSpec(None, 0, (source,), left + 1), torch.int64)

    def combine(self, taps: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [num_tokens, 3 * target_hidden_size], low to high -> [num_tokens, hidden_size],
        which `forward` takes."""
        return F.linear(taps, self.fc)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext,
                intermediate: IntermediateTensors | None = None) -> torch.Tensor:
        """Args:
            input_ids: of the tokens after `positions`.
            intermediate: its hidden_states are those of `combine`, or the result of this method for the place before.

        Returns:
            [num_tokens, hidden_size] before the final norm, the argument of `compute_logits`.
        """
        assert intermediate is not None
        ops, residual = self.ops, intermediate["hidden_states"]
        embedded = ops.rms_norm(self.embed(input_ids), self.embed_norm, self.eps)
        hidden = ops.rms_norm(residual, self.hidden_norm, self.eps)
        if self.norm_before_residual:
            residual = hidden
        rotary = ops.begin_rotary(positions, self.get_buffer("rope_table"), self.dtype)
        qkv = self.qkv(torch.cat((embedded, hidden), -1)).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        x = self.out(ops.rotary_attention(context.attention, 0, qkv, self.kv_heads, rotary))
        x, residual = ops.norm_linear(self.gate_up, x, residual, self.mlp_norm, self.eps, gated=True)
        result: torch.Tensor = self.down(x) + residual
        return result

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As CausalLM, over the target's vocabulary: -inf for a token that the head cannot propose."""
        logits: torch.Tensor = self.head(self.ops.rms_norm(hidden, self.norm, self.eps))
        if self.offsets is None:
            return logits
        targets = torch.arange(len(self.offsets), device=logits.device) + self.offsets
        return logits.new_full((len(logits), self.config.vocab_size), -torch.inf).index_copy_(1, targets, logits)
