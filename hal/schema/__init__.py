"""Declare a step's inputs once; validation, messages, staging, padding and documentation follow."""

from hal.schema.declared import Declared
from hal.schema.fields import DTYPES, Advance, Array, Doc, Field, Scope, stays
from hal.schema.packed import Packed
from hal.schema.schema import Schema

__all__ = ["DTYPES", "Advance", "Array", "Declared", "Doc", "Field", "Packed", "Schema", "Scope", "stays"]
