"""The vocabulary of a declaration: array fields with symbolic shapes, scalars and texts."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hal.errors import SchemaError

Scope = Literal["replicated", "driver", "rank"]
# (value in this step's input, this step's input, what the step gave) -> value in the next decode step's input; see
# hal.contracts.inputs.ModelInput.advance.
Advance = Callable[[Any, Any, Any], Any]
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
_DIM = re.compile(r"^(?:(\d+)\s*\*\s*)?([a-z_][a-z0-9_]*)(?:\s*\+\s*(\d+))?$")


def stays(value: Any, model_input: Any, taken: Any) -> Any:
    """The rule of a field that is the same in the next decode step."""
    return value


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension: `scale * symbol + offset`, or the constant `offset` when symbol is ""."""

    symbol: str
    scale: int = 1
    offset: int = 0

    @classmethod
    def parse(cls, text: str | int) -> Dim:
        """Read "num_tokens", "num_seqs + 1", "2 * num_seqs" or a constant. Raises SchemaError for anything else."""
        if isinstance(text, int):
            if text < 0:
                raise SchemaError("a constant dimension is negative", got=text, expected=">= 0")
            return cls("", 0, text)
        match = _DIM.match(text.strip())
        if match is None:
            raise SchemaError("cannot read a dimension", got=repr(text),
                              expected="'sym', 'sym + 1', '2 * sym' or an int")
        return cls(match[2], int(match[1] or 1), int(match[3] or 0))

    def size(self, dims: dict[str, int]) -> int:
        return self.offset + (self.scale * dims[self.symbol] if self.symbol else 0)

    def __str__(self) -> str:
        if not self.symbol:
            return str(self.offset)
        head = self.symbol if self.scale == 1 else f"{self.scale} * {self.symbol}"
        return f"{head} + {self.offset}" if self.offset else head


@dataclass(frozen=True, slots=True, init=False)
class Array:
    """An array field: `Annotated[torch.Tensor, Array("int32", "num_tokens", pad=0)]` (or numpy.ndarray on the host).

    Args:
        dtype: one of `hal.schema.DTYPES`.
        dims: the shape, outermost first; names are symbols that all fields of an instance must agree on.
        pad: what fills the rows that padding adds; "edge" repeats the last real value along the first dimension.
        scope: "replicated" travels to every rank; "driver" exists on the driver only; "rank" is filled by each rank
            itself. The last two never travel, so their type must admit None.
        low, high: inclusive bounds of legal values, used by the semantic check and by the hypothesis strategy.
        doc: one line for the documentation table.
        advance: how the field becomes that of the next decode step, for inputs of model runners; `stays` where it is
            the same. None: the field has no rule, so its input cannot be advanced while the field is present.
    """

    dtype: str
    dims: tuple[Dim, ...]
    pad: float | Literal["edge"]
    scope: Scope
    low: float | None
    high: float | None
    doc: str
    advance: Advance | None

    def __init__(self, dtype: str, *dims: str | int, pad: float | Literal["edge"] = 0, scope: Scope = "replicated",
                 low: float | None = None, high: float | None = None, doc: str = "",
                 advance: Advance | None = None) -> None:
        if dtype not in DTYPES:
            raise SchemaError("unknown dtype in a declaration", got=dtype, expected=", ".join(DTYPES))
        for name, value in (("dtype", dtype), ("dims", tuple(map(Dim.parse, dims))), ("pad", pad), ("scope", scope),
                            ("low", low), ("high", high), ("doc", doc), ("advance", advance)):
            object.__setattr__(self, name, value)

    @property
    def shape_text(self) -> str:
        return "[" + ", ".join(map(str, self.dims)) + "]"


@dataclass(frozen=True, slots=True)
class Doc:
    """Documentation and scope of a scalar or text field: `Annotated[int, Doc("longest query of the batch")]`. `advance`
    is as that of Array; a scalar without a rule stays as it is."""

    doc: str = ""
    scope: Scope = "replicated"
    advance: Advance | None = None


Kind = Literal["tensor", "ndarray", "int", "float", "bool", "str", "texts"]
_SCALARS: dict[Any, Kind] = {int: "int", float: "float", bool: "bool", str: "str"}


@dataclass(frozen=True, slots=True)
class Field:
    """One resolved field of a schema."""

    name: str
    kind: Kind
    optional: bool
    scope: Scope
    array: Array | None
    doc: str
    advance: Advance | None = None

    @property
    def describe(self) -> str:
        """Canonical text; the schema fingerprint is a hash over these."""
        a = self.array
        what = f"{a.dtype}{a.shape_text}|pad={a.pad}" if a else self.kind
        return f"{self.name}:{what}|{'opt' if self.optional else 'req'}|{self.scope}"


def _is_texts(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and typing.get_args(hint) == (str, Ellipsis)


def resolve(owner: str, name: str, hint: Any) -> Field:
    """Turn one annotation (from get_type_hints with include_extras) into a Field. Raises SchemaError."""
    extras: list[Any] = []
    optional = False
    while True:
        origin = typing.get_origin(hint)
        if origin is typing.Annotated:
            hint, *found = typing.get_args(hint)
            extras += found
        elif origin in (typing.Union, types.UnionType):
            rest = [a for a in typing.get_args(hint) if a is not type(None)]
            if len(rest) != 1:
                raise SchemaError(f"{owner}.{name} is a union", got=hint, expected="one type, optionally with None")
            optional, hint = True, rest[0]
        else:
            break
    array = next((e for e in extras if isinstance(e, Array)), None)
    doc = next((e for e in extras if isinstance(e, Doc)), Doc())
    if array is not None:
        kind: Kind = "tensor" if getattr(hint, "__name__", "") == "Tensor" else "ndarray"
        field = Field(name, kind, optional, array.scope, array, array.doc, array.advance)
    elif hint in _SCALARS:
        field = Field(name, _SCALARS[hint], optional, doc.scope, None, doc.doc, doc.advance or stays)
    elif _is_texts(hint):
        field = Field(name, "texts", optional, doc.scope, None, doc.doc, doc.advance or stays)
    else:
        raise SchemaError(f"{owner}.{name} has a type that cannot be declared", got=hint,
                          expected="Annotated[torch.Tensor or numpy.ndarray, Array(...)], int, float, bool, str "
                                   "or tuple[str, ...]")
    if field.scope != "replicated" and not optional:
        raise SchemaError(f"{owner}.{name} never travels (scope={field.scope!r}) but is required",
                          expected="a type that admits None", hint="add `| None = None`")
    return field
