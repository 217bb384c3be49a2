"""Base class of everything that is declared once: typed, packed, validated, padded, documented from its annotations."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import dataclass_transform

from hal.errors import SchemaError
from hal.schema.fields import Array, Field, resolve
from hal.schema.packed import Buffer, packed_source
from hal.schema.schema import Schema
from hal.schema.validate import validate

Self = typing.TypeVar("Self", bound="Declared")


@dataclass_transform(kw_only_default=True, eq_default=False)
class Declared:
    """Subclass this and annotate fields. The class becomes a keyword-only dataclass, with the methods below.

        class StepInput(Declared):
            input_ids: Annotated[torch.Tensor, Array("int32", "num_tokens")]
            seq_lens: Annotated[torch.Tensor, Array("int32", "num_seqs")]
            max_seq_len: int = 0

    Raises:
        SchemaError: at class definition, when an annotation cannot be declared.
    """

    schema: ClassVar[Schema[Any]]

    def __init_subclass__(cls, *, fields: Mapping[str, tuple[Any, Any]] | None = None, **kwargs: Any) -> None:
        """`fields`: fields beside those of the class body, as (annotation, default) by name."""
        super().__init_subclass__(**kwargs)
        for name, (hint, default) in (fields or {}).items():
            cls.__annotations__[name] = hint
            setattr(cls, name, default)
        dataclasses.dataclass(kw_only=True, eq=False, repr=False)(cls)
        hints = typing.get_type_hints(cls, include_extras=True)
        declared = dataclasses.fields(cls)  # type: ignore[arg-type]
        defaults = {f.name: f.default for f in declared if f.default is not dataclasses.MISSING}
        cls.schema = Schema(cls, tuple(resolve(cls.__name__, f.name, hints[f.name]) for f in declared), defaults)

    @classmethod
    def declare(cls: type[Self], name: str, **arrays: Array) -> type[Self]:
        """Make a subclass at run time, for shapes and dtypes that only a model's configuration knows.

        Raises:
            SchemaError: a declaration is wrong, or there is none.
        """
        import torch

        if not arrays:
            raise SchemaError(f"{name} declares no field")
        hints = {n: typing.Annotated[torch.Tensor, a] for n, a in arrays.items()}
        return type(name, (cls,), {"__annotations__": hints, "__module__": cls.__module__})

    def to_buffer(self) -> Buffer:
        """The instance as one message (uint8). One made from a packed buffer is that buffer; any other is copied
        once. The shapes must be valid (see `validate`)."""
        packed = packed_source(self) or type(self).schema.pack(self)
        return packed.message

    def checksum(self) -> int:
        """CRC-32 of the replicated fields, the ones that travel. Equal fields have equal checksums. The shapes must be
        valid."""
        return (packed_source(self) or type(self).schema.pack(self)).checksum()

    @property
    def dims(self) -> dict[str, int]:
        """The size of each symbol. Do not change the dictionary. The shapes must be valid."""
        packed = packed_source(self)
        return packed.dims if packed else type(self).schema.dims(self)

    @classmethod
    def from_buffer(cls: type[Self], buffer: Any, device: Any = None) -> Self:
        """The instance in a message, as views of `buffer` on the host, or moved to `device` with one copy.

        Raises:
            WireError: the message is truncated, corrupt, foreign or of another schema.
        """
        result: Self = cls.schema.unpack(buffer).to(device)
        return result

    def validate(self, device: Any = None) -> None:
        """Structural check: dtypes, ranks, symbols that agree, contiguity, and the device where given.

        Raises:
            InputError: naming the field at fault.
        """
        validate(self, device)

    def check(self) -> None:
        """Semantic check, run under HAL_STRICT=1 after `validate`: values within each field's declared bounds.
        Subclasses extend it. Raises InputError."""
        from hal.schema.validate import check_bounds

        check_bounds(self)

    def padded(self: Self, **bucket: int) -> Self:
        """A copy with the named symbols grown to the sizes of a bucket (see `Packed.padded`), on the host."""
        result: Self = type(self).schema.pack(self).padded(**bucket).to()
        return result

    def __getitem__(self, name: str) -> Any:
        field: Field | None = type(self).schema.by_name.get(name)
        if field is None:
            raise KeyError(name)
        return self.__dict__[name]

    def __repr__(self) -> str:
        shown = []
        for f in type(self).schema.fields:
            value = self.__dict__.get(f.name)
            if value is not None:
                shown.append(f"{f.name}={f.array.dtype}{list(value.shape)}" if f.array else f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"
