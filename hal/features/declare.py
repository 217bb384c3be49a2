"""The declaration of a step feature: what a request may ask for, and what a step carries for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from hal.errors import InputError, SchemaError
from hal.features.params import Param, Params
from hal.schema import Array, Doc, stays
from hal.schema.examples import make_array

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

Ints = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
Fields = dict[str, np.ndarray[Any, Any] | int]  # arrays and scalars of a step's input, by name


@dataclass(frozen=True, slots=True)
class Column:
    """A parameter that travels as one number for each sequence.

    Attributes:
        name: the name of the parameter, of the column in the rows' state, and of the input's field.
        dtype: the dtype of the field. `kind`: the request's matrix that carries the column.
        default: the parameter's default as a number; None is -1. low, high: legal numbers, inclusive.
    """

    name: str
    dtype: str
    default: float
    low: float
    high: float

    @property
    def kind(self) -> Literal["float", "int"]:
        return "float" if self.dtype.startswith("float") else "int"

    def number(self, value: float | bool | None) -> float:
        """The number by which the column holds a value of the parameter."""
        return -1 if value is None else value


class Rows(Protocol):
    """The state of running sequences (hal.paged.batch.BatchState), as a feature reads it. Each sequence has one row.

    Attributes:
        token_ids: int32 [max_rows, max_model_len]. num_tokens, prompt_lens: int32 [max_rows].
        vocab_size: token ids lie below it. asynchronous: sampled tokens may stay on the device for a step.
    """

    token_ids: Ints
    num_tokens: Ints
    prompt_lens: Ints
    vocab_size: int
    asynchronous: bool

    def column(self, name: str, rows: Ints) -> np.ndarray[Any, Any]:
        """The values of a column for these rows."""


def _no_column(name: str) -> np.ndarray[Any, Any]:
    raise KeyError(name)


@dataclass(slots=True)
class StepRows:
    """A step whose input is being prepared.

    Attributes:
        state: the state of all rows. request: the ExecuteModelRequest that is being prepared.
        sampled: the rows that get a token in this step, in the order of the step's output. A row with drafts is there
            once for each of its places: the token before its drafts, and each draft.
        places: these tokens, as indices into row_of, positions and input_ids.
        row_of, positions: for each token that the step computes, its row and its place in the sequence.
        input_ids: the tokens that the step computes; a feature may replace the array.
        targets: a feature sets this: tokens whose logits are needed beside those of the sampled rows, as indices into
            row_of, positions and input_ids.
        column: a function that gives the values of a column for the sampled rows.
        asked, asked_drawn: columns in which a sampled row differs from the default, and columns in which a sampled row
            with a temperature above 0 does.
    """

    state: Rows
    request: Any
    sampled: Ints
    places: Ints
    row_of: Ints
    positions: Ints
    input_ids: Ints
    targets: Ints
    column: Callable[[str], np.ndarray[Any, Any]] = _no_column
    asked: frozenset[str] = frozenset()
    asked_drawn: frozenset[str] = frozenset()


class FeatureState(Protocol):
    """The state that a feature keeps for each row, beside its columns."""

    def apply(self, request: Any) -> Ints:
        """Store a request's new rows. Returns the rows for which the feature has something to do."""


class Feature:
    """Something that a step carries for a sequence. A subclass is a declaration. From it follow the public parameter,
    the command-line option, the JSONL key, the request's columns, the rows' state, the input's fields, the hypothesis
    strategy, the recording and the documentation.

    Attributes:
        params: the public parameters. Those with a `column` travel as one number a sequence.
        fields: further arrays of the step's input, all optional. Their first dimension is "num_sampled", unless
            `prepare` gives another size.
        scalars: further integers of the step's input, and their defaults.
        request: further arrays of ExecuteModelRequest, all optional.
        drawn: the feature only matters to sequences with a temperature above 0, whose tokens are drawn at random.
        always: `prepare` is called in every step. If False, it is called only when a row has a parameter that is not
            the default, or the request has arrays of the feature.
        per_step: the arrays of `request` may come with any step, not only with a step that brings new rows.
        for_sampling: only sampling reads the arrays of the step's input, and no layer of a model does. So the arrays of
            `request` may arrive after the forward pass has begun (see hal.contracts.request.SamplingRequest).
        together: a step has all fields of the feature, or none.
        needs_tokens: the feature reads tokens that may still be pending under asynchronous scheduling. So a sequence
            that asks for the feature is scheduled only when its last token is known on the host.
        column_fields: the columns are fields of the step's input. If False, they stay in the rows' state.
    """

    params: ClassVar[type[Params]] = Params
    fields: ClassVar[Mapping[str, Array]] = {}
    scalars: ClassVar[Mapping[str, tuple[int, Doc]]] = {}
    request: ClassVar[Mapping[str, Array]] = {}
    drawn: ClassVar[bool] = False
    always: ClassVar[bool] = False
    per_step: ClassVar[bool] = False
    for_sampling: ClassVar[bool] = False
    together: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False
    column_fields: ClassVar[bool] = True
    columns: ClassVar[tuple[Column, ...]] = ()
    names: ClassVar[frozenset[str]] = frozenset()  # of the columns

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.columns = tuple(_columns(cls.params))
        cls.names = frozenset(c.name for c in cls.columns)
        if cls.for_sampling and (cls.scalars or not cls.request):
            raise SchemaError(f"{cls.__name__} cannot be for_sampling", got=f"scalars={dict(cls.scalars)}, "
                              f"request={dict(cls.request)}", expected="no scalars, and arrays of the request")
        if cls.column_fields:
            cls.fields = {**{c.name: _field(cls.params, c) for c in cls.columns}, **cls.fields}

    def make_state(self, max_rows: int, vocab_size: int) -> FeatureState | None:
        """Make the state that is kept for each row beside the columns, or None if there is none."""
        return None

    def request_fields(self, entered: Sequence[Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of `request`, for the sequences that enter rows (each has `params` and `row`)."""
        return {}

    def check_request(self, request: Any, vocab_size: int) -> None:
        """Check the arrays of `request` in a request that is not trusted, such as one from a recording. Its columns are
        checked already. Raises InputError: an array cannot be applied."""

    def renamed(self, request: Any, ids: Ints) -> dict[str, np.ndarray[Any, Any]]:
        """Those arrays of `request` that hold token ids, when token i becomes token ids[i]. For a recording that is
        shared without its text."""
        return {}

    def prepare(self, step: StepRows, state: FeatureState | None) -> Fields:
        """The fields that this step needs. They are empty if no sampled row asks for the feature. By default they are
        the columns, if a sampled row differs from the default of one of them."""
        if self.names.isdisjoint(step.asked_drawn if self.drawn else step.asked):
            return {}
        return {name: step.column(name) for name in self.names}

    def present(self, model_input: Any) -> bool:
        """Whether a step's input carries the feature."""
        return any(model_input[name] is not None for name in self.fields)

    def adjust(self, scores: torch.Tensor, model_input: Any) -> torch.Tensor:
        """Change the scores before a token is chosen. It is called when the feature is present in the step's input.

        Args:
            scores: fp32 [n, vocab_size], of the first n sampled rows. The caller owns the memory and shares it with
                nobody.

        Returns:
            The same shape and dtype; `scores` itself may be changed and returned.
        """
        return scores

    def restore(self, model_input: Any, i: int) -> dict[str, Any]:
        """The parameters of sampled row i, from a step's input on the host. A recording reads parameters by this."""
        if not self.column_fields or not self.present(model_input):
            return {}
        return {c.name: _value(self.params, c, model_input[c.name][i].item()) for c in self.columns}

    def restore_request(self, model_input: Any, rows: Ints) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of `request` that are given per step, as a step's input on the host shows them; `rows` are those
        of its sampled sequences."""
        return {}

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        """Consistent fields for a made-up batch of `hal.testing.strategies`. By default each field is made by itself,
        within its declared bounds."""
        return {name: make_array(array, {"num_sampled": len(batch.lens)}, rng) for name, array in self.fields.items()}


def need(field: str, good: bool, got: object, expected: object) -> None:
    """Raise an InputError that names a field of ExecuteModelRequest, unless `good`."""
    if not good:
        raise InputError(f"ExecuteModelRequest.{field} is inconsistent", got=str(got)[:200], expected=expected,
                         fields=(field,))


@dataclass(frozen=True, slots=True)
class Batch:
    """A made-up batch.

    Attributes:
        queries: the number of tokens to compute, of each sequence. row_of: the sequence of each of these tokens.
        sampled: the sequences that get a token. lens: the number of tokens that each of these has.
        num_targets: the number of tokens whose logits are needed beside those of the sampled sequences.
        vocab_size: token ids lie below it.
    """

    queries: list[int]
    row_of: Ints
    sampled: list[int]
    lens: list[int]
    num_targets: int
    vocab_size: int


def _columns(params: type[Params]) -> list[Column]:
    found = []
    for name in params.names():
        param, default = params.param(name), getattr(params, name)
        if param.column is not None:
            number = -1 if default is None else default
            if not isinstance(number, (int, float)):
                raise SchemaError(f"{params.__name__}.{name} cannot be a column", got=default,
                                  expected="a number or None as its default")
            low, high = _bounds(param)
            found.append(Column(name, param.column, number, min(low, number), high))
    return found


def _field(params: type[Params], column: Column) -> Array:
    param: Param = params.param(column.name)
    low, high = None if param.low is None else column.low, param.high
    if column.kind == "int":  # a bound that the dtype implies is left out
        limits = np.iinfo(column.dtype)
        low, high = (None if low is None or low <= limits.min else low), (None if high is None or high >= limits.max
                                                                          else high)
    return Array(column.dtype, "num_sampled", low=low, high=high, pad=column.default, doc=param.help,
                 advance=stays)


def _bounds(param: Param) -> tuple[float, float]:
    """The inclusive bounds of a parameter, within the range of the column's dtype."""
    if param.column is not None and param.column.startswith("float"):
        most = float(np.finfo(np.float32).max)
        smallest = float(np.finfo(np.float32).smallest_subnormal)
        low = -most if param.low is None else param.low + (smallest if param.above else 0)
        return low, most if param.high is None else param.high
    return -(2**63) if param.low is None else param.low, 2**63 - 1 if param.high is None else param.high


def _value(params: type[Params], column: Column, number: float) -> Any:
    return None if params.kind(column.name)[1] and number == -1 else number
