"""The fingerprint of a running step, which ranks compare: its number, its input, and the collectives that a rank has
begun. Without the comparison, ranks that differ would wait in different collectives, or give a wrong token."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from hal.config import AXES
from hal.errors import StateError
from hal.schema.packed import Buffer

OPERATIONS = "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"
KINDS = "nothing yet", *(f"{operation} over {axis}" for operation in OPERATIONS for axis in AXES)
_NUMBERS = {pair: number for number, pair in enumerate(product(OPERATIONS, AXES), 1)}
STEP = "step", "input digest"  # equal on all ranks; the rest is equal on the ranks of a pipeline stage
FIELDS = *STEP, "number of collectives", "operation", "bytes"
_FORM = struct.Struct(f"<{len(FIELDS)}q")
SEAL = _FORM.size
_HINT = ("all ranks prepare the same input (fields that differ are declared with scope='rank') and call the same "
         "collectives; with wire='none' all are given the same requests, in the same order")


@dataclass(slots=True)
class Fingerprint:
    """Attributes:
        step: number of the step that runs, from 1; 0 before the first. digest: checksum of its ModelInput.
        collectives: begun in it. kind, nbytes: the last one's, as an index of KINDS, and a size that all of its ranks
            have in common: that of the tensor, or of a row of it where ranks have different numbers of rows.
    """

    step: int = 0
    digest: int = 0
    collectives: int = 0
    kind: int = 0
    nbytes: int = 0

    def begin(self, step: int, digest: int) -> None:
        self.step, self.digest, self.collectives, self.kind, self.nbytes = step, digest, 0, 0, 0

    def join(self, digest: int) -> None:
        """Add the step's SamplingInput, which has this checksum."""
        self.digest ^= digest

    def count(self, operation: str, axis: str, nbytes: int) -> None:
        """Count a collective that begins: one of OPERATIONS over one of AXES."""
        self.collectives, self.kind, self.nbytes = self.collectives + 1, _NUMBERS[operation, axis], nbytes

    def pack(self) -> bytes:
        """The fingerprint as SEAL bytes."""
        return _FORM.pack(*self._values())

    def compare(self, theirs: Any, peer: str, fields: tuple[str, ...] = FIELDS) -> None:
        """Args: theirs: packed by `peer`, in any buffer. Raises StateError: names the first field that differs."""
        for field, own, other in zip(FIELDS, self._values(), _FORM.unpack(theirs), strict=True):
            if own != other and field in fields:
                raise StateError(f"{peer} went another way than this one: they differ in {field}",
                                 got=self._shown(field, other), expected=self._shown(field, own), hint=_HINT)

    def _values(self) -> tuple[int, ...]:
        return self.step, self.digest, self.collectives, self.kind, self.nbytes

    def _shown(self, field: str, value: int) -> str:
        if field == "step":
            return str(value)
        text = {"operation": dict(enumerate(KINDS)).get(value, "unknown"), "input digest": f"{value:08x}"}.get(field)
        return f"{text or value} (in step {self.step})"

    def seal(self, message: Buffer) -> Buffer:
        """The message with this fingerprint appended. `from_buffer` does not read behind the message's own size."""
        return np.concatenate([message, np.frombuffer(self.pack(), np.uint8)])

    def open(self, sealed: Buffer, peer: str) -> Buffer:
        """The message that `peer` sealed in the same step. Raises StateError."""
        self.compare(sealed[-SEAL:], peer, STEP)
        return sealed[:-SEAL]

    def copy(self) -> Fingerprint:
        return replace(self)
