"""The cache that a model declares for each of its layers: paged keys and values, a state per row, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hal.contracts.attention import AttentionSpec
from hal.errors import SchemaError
from hal.schema import Array


@dataclass(frozen=True, slots=True)
class RowState:
    """The state that a recurrent or convolutional layer keeps for a sequence, on one rank: tensors whose shapes do not
    depend on the length of the sequence. Sequences cannot share a prefix, since the state after the prefix is not kept.

    Attributes:
        tensors: by name the shape and dtype that one row has, such as {"state": Array("float32", heads, head_dim)}.

    Raises:
        SchemaError: a dimension is not a constant.
    """

    tensors: Mapping[str, Array]

    def __post_init__(self) -> None:
        for name, array in self.tensors.items():
            if any(dim.symbol for dim in array.dims):
                raise SchemaError(f"the row state {name!r} has a size that is not a constant", got=array.shape_text,
                                  expected="integers alone")


LayerCache = AttentionSpec | RowState | None
