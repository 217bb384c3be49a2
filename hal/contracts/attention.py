"""The attention component: a backend supplies it, and a model calls it once for each layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from hal.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from hal.contracts.inputs import ModelInput, PagedModelInput


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention on one rank, and with it the layer's paged cache of keys and values. Heads are counted
    after tensor-parallel sharding.

    Attributes:
        head_dim: size of a head of queries and keys.
        scale: multiplies q·k. window: tokens that a query sees, its own included; None sees all before it.
        value_dim: size of a head of values, and of the output; head_dim where it is not given.
        softcap: scores s become softcap * tanh(s / softcap) before the mask (arXiv 2408.00118); None leaves them.
        sinks: [num_heads], a learned score of each head that takes part in the softmax and adds no value
            (arXiv 2508.10925); None has none. A parameter of the model, so it may be filled after the declaration.
        values_in_keys: a value is the first value_dim entries of its key (latent attention, arXiv 2405.04434), so the
            cache stores no values.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    value_dim: int = 0
    softcap: float | None = None
    sinks: torch.Tensor | None = field(default=None, compare=False)
    values_in_keys: bool = False

    def __post_init__(self) -> None:
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)


class LayerAttention(Protocol):
    """One step's attention, as a model sees it."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write k and v to the cache, then attend causally over each sequence's context.

        Args:
            layer: counts the layers of this rank's stage that declare an AttentionSpec, from 0.
            q: [num_tokens, num_heads, head_dim]. k: [num_tokens, num_kv_heads, head_dim]. Positions are applied.
            v: [num_tokens, num_kv_heads, value_dim]; k[..., :value_dim] where the layer declares values_in_keys.

        Returns:
            [num_tokens, num_heads * value_dim], in q's dtype. Rows of padding are finite, and otherwise arbitrary.
        """


class StepStates(Protocol):
    """The states of one step's sequences, as a model's layers see them.

    `layer` counts the layers of this rank's stage that keep a state, from 0.
    """

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """Each tensor of the layer's state, as new memory [num_seqs, *shape]. It is zero for a sequence that begins
        with this step, whatever its row held before."""

    def write(self, layer: int, **values: torch.Tensor) -> None:
        """Keep each tensor [num_seqs, *shape] until the sequences' next step. A sequence without a token in this step
        must get the value that `read` gave. The value of a sequence of padding is dropped."""


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """The argument of a model beside tokens and positions: everything that its layers may read of a step.

    Attributes:
        attention: of this step. model_input: its input; a layer reads the fields of step features from it.
        states: of this step's sequences; None where no layer of this rank's stage keeps a state per row.
        taps: by number of a layer of this rank's stage, the layer's input [num_tokens, hidden_size]. The caller names
            the layers as keys, and the model sets the values; None where no input is wanted.
        rows: int32 or int64 [k], the tokens whose hidden states are wanted at the end; None: all. Only a model that
            `selects_rows` is given them. Behind the attention of its last layer it computes these alone.
    """

    attention: LayerAttention
    model_input: ModelInput
    states: StepStates | None = None
    taps: dict[int, torch.Tensor | None] | None = None
    rows: torch.Tensor | None = None


class Attention(Protocol):
    """A backend's attention, made for the layers of this rank's stage that declare an AttentionSpec. It refuses layers
    that it cannot compute when it is made (see refuse_unsupported)."""

    def cache_shape(self, spec: AttentionSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """The shape of a layer's cache. Dimension 1 counts blocks, so that the worker can copy and swap blocks without
        knowing the other dimensions."""

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> LayerAttention:
        """Do the work that all layers of a step share, such as masks and indices. Called once for each step."""


class MakeAttention(Protocol):
    def __call__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> Attention:
        """Raises ConfigError: a layer declares what this attention cannot do."""


def refuse_unsupported(specs: Sequence[AttentionSpec], who: str, supported: Collection[str] = ()) -> None:
    """Refuse layers that an attention cannot compute. A backend's attention calls this when it is made.

    Args:
        who: the attention's name. supported: which of "value_dim", "softcap", "sinks" and "values_in_keys" it can do.

    Raises:
        ConfigError: a layer declares what is not supported.
    """
    for layer, spec in enumerate(specs):
        declared = {"value_dim": spec.value_dim != spec.head_dim and not spec.values_in_keys,
                    "softcap": spec.softcap is not None, "sinks": spec.sinks is not None,
                    "values_in_keys": spec.values_in_keys}
        for name in declared:
            if declared[name] and name not in supported:
                value = "of each head" if name == "sinks" else getattr(spec, name)
                raise ConfigError(f"{who} does not support {name}, which a layer of this model declares",
                                  got=f"{name} {value} in attention layer {layer}, whose head_dim is {spec.head_dim}",
                                  expected=f"layers without {name}", hint="run this model on --device cpu, or give the "
                                  "runner hal.paged.attention.PagedAttention")
