"""Weight schemes: the tensors that a linear layer's weight is made of, and a rank's part of each.

Importing this loads no torch.
"""

from __future__ import annotations

from hal.weights.base import Dim, LinearSpec, Projection, Scheme, WeightTensor

__all__ = ["Dim", "LinearSpec", "Projection", "Scheme", "WeightTensor"]
