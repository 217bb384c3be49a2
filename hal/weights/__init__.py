"""How the weight of a linear layer is stored: which tensors it is made of, and how a rank's part of each is cut.

Importing this loads no torch.
"""

from __future__ import annotations

from hal.weights.base import Dim, LinearSpec, Projection, Scheme, WeightTensor

__all__ = ["Dim", "LinearSpec", "Projection", "Scheme", "WeightTensor"]
