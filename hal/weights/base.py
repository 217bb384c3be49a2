"""The declaration of weight schemes: a linear layer's sizes, and the tensors that its weight is made of."""

from __future__ import annotations

import abc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hal.errors import SchemaError

if TYPE_CHECKING:
    import torch

    from hal.models.layers import Linear


_PREFIX = re.compile(r"^(model|transformer|bert|roberta)\.(?!lm_head\.)")


def canonical(name: str) -> str:
    """A stored tensor's name without the prefix of its model, such as "model." or "bert."."""
    return _PREFIX.sub("", name)


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map that the checkpoint stores by itself. A layer may merge several, such as q, k and v.

    Attributes:
        name: in the checkpoint, without the tensor's own name ("layers.0.self_attn.q_proj").
        size: outputs over all ranks.
        heads: the attention heads that the outputs belong to. A head is never cut; ranks share heads that are fewer
            than the ranks. None: the outputs are no heads.
        start, of: the outputs are the range that begins at `start` in stored tensors of `of` outputs. None: the stored
            tensors hold this projection alone.
    """

    name: str
    size: int
    heads: int | None = None
    start: int = 0
    of: int | None = None


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A linear layer over all ranks.

    Attributes:
        in_size: inputs. projections: their outputs lie side by side.
        sharded: the axis that is sharded: "out" in a column-parallel layer, "in" in a row-parallel one.
        transposed: the checkpoint stores a dense weight as [in, out].
        mesh_axis: of the topology; the ranks along it have a part each.
    """

    in_size: int
    projections: tuple[Projection, ...]
    sharded: Literal["out", "in"]
    transposed: bool = False
    mesh_axis: str = "tp"

    @property
    def name(self) -> str:
        """For messages: the first projection's."""
        return self.projections[0].name


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of a weight's tensor, in terms of the layer's sizes.

    Attributes:
        axis: "out" or "in" counts the layer's outputs or inputs. "part" counts the projections that the layer
            merges: the layer's tensor has one entry for each, and a stored tensor, which belongs to one projection,
            lacks the dimension.
        per, holds: every `per` outputs or inputs take `holds` entries; the last of them may be fewer than `per`. For
            instance, 8 values of 4 bits in an int32 are per=8; the scale of a group of 128 inputs is per=128; a block
            of 32 values in 18 bytes is per=32, holds=18.
        replicated: every rank holds the whole dimension, though the layer is sharded along it. For scales whose order
            another tensor gives, so that a rank may need any of them. Only of the axis "in".
    """

    axis: Literal["out", "in", "part"]
    per: int = 1
    holds: int = 1
    replicated: bool = False

    def __post_init__(self) -> None:
        if self.per < 1 or self.holds < 1 or (self.axis != "in" and self.replicated) or (
                self.axis == "part" and (self.per, self.holds) != (1, 1)):
            raise SchemaError("a dimension of a weight's tensor is not usable", got=self,
                              expected="per and holds of at least 1, replicated only of the axis 'in', and neither of "
                                       "them of the axis 'part'")

    def entries(self, units: int) -> int:
        """That one projection of so many outputs or inputs takes."""
        return 1 if self.axis == "part" else -(-units // self.per) * self.holds


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """One of the tensors that a linear layer's weight is made of.

    Attributes:
        name: in the layer and, after the projection's name, in the checkpoint: "weight", "scales", "qzeros".
        dims: of the layer's tensor; an integer is a fixed size. Exactly one counts outputs or parts, and the tensors of
            merged projections lie one after another along it.
        dtype: as torch spells it; None is the model's. Any stored floating-point dtype is converted to float64,
            float32, bfloat16 and float16. Every other dtype must be stored as declared.
        transposed: a stored tensor has its two dimensions the other way round.
        below: integers of the tensor lie from 0 to below this bound. A checkpoint is refused that breaks it; for
            indices, which would otherwise reach memory of others. None: any integer.
    """

    name: str
    dims: tuple[Dim | int, ...]
    dtype: str | None = None
    transposed: bool = False
    below: int | None = None

    def __post_init__(self) -> None:
        axes = [d.axis for d in self.dims if isinstance(d, Dim)]
        if axes.count("out") + axes.count("part") != 1 or axes.count("in") > 1:
            raise SchemaError(f"the dimensions of the tensor {self.name!r} do not say how projections are merged",
                              got=axes, expected="exactly one of the axes 'out' and 'part', and 'in' at most once")
        if self.transposed and ("part" in axes or len(self.dims) != 2):
            raise SchemaError(f"the tensor {self.name!r} cannot be stored transposed", got=self.dims,
                              expected="two dimensions, none of them of the axis 'part'")

    @property
    def merged(self) -> tuple[int, Dim]:
        """The dimension along which the tensors of merged projections lie one after another, with its number."""
        return next((i, d) for i, d in enumerate(self.dims) if isinstance(d, Dim) and d.axis != "in")

    @property
    def inner(self) -> tuple[int, Dim] | None:
        """The dimension that counts inputs, if there is one, with its number."""
        return next(((i, d) for i, d in enumerate(self.dims) if isinstance(d, Dim) and d.axis == "in"), None)


class Scheme(abc.ABC):
    """A way to store a linear layer's weight. A scheme declares its tensors and how to compute with them in plain
    PyTorch; loading and sharding follow. Two projections can be merged into one layer if their schemes are equal (==).

    Attributes:
        name: in errors, and in Ops.schemes.
        ignored: names, as WeightTensor.name, of stored tensors that may be there and have no effect.
        on_load: the checkpoint stores a dense weight, of which `quantize` makes the tensors.
    """

    name: str
    ignored: tuple[str, ...] = ()
    on_load: bool = False

    @property
    def mixes_rows(self) -> bool:
        """A row's product depends on the other rows of the step, as with one scale for all of them."""
        return False

    @abc.abstractmethod
    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        """The tensors of this layer's weight; the bias, which every layer has in the model's dtype, is not among them.

        Raises:
            ConfigError: the scheme has no form for a layer of this size.
        """

    @abc.abstractmethod
    def dequantize(self, layer: Linear) -> torch.Tensor:
        """The rank's weight [out, in] in `layer.dtype`. `layer.stored` gives the declared tensors."""

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """By name, the tensors that come closest to a dense weight [out, in], or to some outputs of it; for schemes
        that are `on_load`. Each output is rounded by itself."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """x [n, in] in the model's dtype times the transposed weight, plus the bias -> [n, out], on any device that
        PyTorch runs on. Every device's own kernel is compared with this one."""
        import torch.nn.functional as F

        return F.linear(x, self.dequantize(layer), layer.bias)
