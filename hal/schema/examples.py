"""Made-up contents of declared arrays, for property tests."""

from __future__ import annotations

import numpy as np

from hal.schema.fields import Array
from hal.schema.layout import NP_DTYPES, bfloat16_bits


def make_array(a: Array, dims: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """Any legal content of a declared array, bfloat16 as its bits."""
    shape = tuple(d.size(dims) for d in a.dims)
    dtype = NP_DTYPES[a.dtype]
    if a.low is not None or a.high is not None:
        low, high = a.low if a.low is not None else -1000, a.high if a.high is not None else 1000
        if a.dtype == "bfloat16":
            array = bfloat16_bits(rng.uniform(low, high, shape))
        elif dtype.kind in "iu":
            array = rng.integers(int(low), int(high) + 1, shape).astype(dtype)
        else:
            array = rng.uniform(low, high, shape).astype(dtype)
    elif a.dtype == "bool":
        array = rng.integers(0, 2, shape).astype(np.bool_)
    else:  # any bits, NaN included
        array = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape).copy()
    return array
