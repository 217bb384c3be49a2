"""The one table of tolerances: how far a result may be from an fp64 reference, by class of operation and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hal.errors import ConfigError

# The largest |got - expected| / (1 + |expected|). The reference is computed in fp64 from the same rounded arguments.
# Each value is about four times the error of plain PyTorch on a CPU and an H200 over many seeds. This leaves room for
# another order of summation, but not for another precision.
TOLERANCES: dict[str, dict[str, float]] = {
    "linear": {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3},
    "weights": {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3},  # of few bits, with exact inputs
    "weights_fp8": {"float32": 0.25, "bfloat16": 0.25, "float16": 0.25},  # inputs may be rounded to e4m3
    "weights_int8": {"float32": 5e-2, "bfloat16": 8e-2, "float16": 5e-2},  # inputs may be rounded to int8
    "experts": {"float32": 2e-4, "bfloat16": 8e-2, "float16": 1.2e-2},  # dense or of few bits, with exact inputs
    "norm": {"float32": 3e-5, "bfloat16": 2e-2, "float16": 3e-3},
    "rotary": {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3},
    "activation": {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3},
    "attention": {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3},
    "sampler": {"float32": 1e-4, "bfloat16": 1e-4, "float16": 1e-4},  # the sampler computes in fp32
    "model": {"float32": 2e-4, "bfloat16": 1.5e-1, "float16": 2e-2},  # logprobs of a whole model
}


@dataclass(frozen=True, slots=True)
class Tolerances:
    """The table, with the entries that a run widened.

    Attributes:
        widened: the widened values, by (operation, dtype). A report lists them.
    """

    widened: dict[tuple[str, str], float] = field(default_factory=dict)

    def __call__(self, op: str, dtype: str) -> float:
        return self.widened.get((op, dtype), TOLERANCES[op][dtype])

    @classmethod
    def parse(cls, texts: list[str]) -> Tolerances:
        """From "attention:bfloat16=0.05".

        Raises:
            ConfigError: no such entry, or the value is narrower than the table's, or not finite.
        """
        widened = {}
        for text in texts:
            key, _, value = text.partition("=")
            op, _, dtype = key.partition(":")
            try:
                number = float(value)
                usual = TOLERANCES[op][dtype]
            except (ValueError, KeyError):
                raise ConfigError("a tolerance cannot be read", got=text, expected="OP:DTYPE=VALUE with OP one of "
                                  f"{', '.join(TOLERANCES)}") from None
            if not usual <= number < math.inf:  # no error is larger than NaN, so every error would pass
                raise ConfigError("a tolerance may be widened, not narrowed", got=text,
                                  expected=f"a finite number of at least {usual}")
            widened[op, dtype] = number
        return cls(widened)

    def options(self) -> str:
        return "".join(f" --tolerance {op}:{dtype}={value:g}" for (op, dtype), value in self.widened.items())
