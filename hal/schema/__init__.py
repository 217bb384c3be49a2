"""Declare a step's inputs once; validation, messages, staging, padding and documentation follow."""

from hal.schema.declared import Declared
from hal.schema.fields import DTYPES, Array, Doc, Field, Scope
from hal.schema.packed import Packed
from hal.schema.schema import Schema

__all__ = ["DTYPES", "Array", "Declared", "Doc", "Field", "Packed", "Schema", "Scope"]
