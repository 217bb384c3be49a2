"""Random drawing of a token: temperature and seed, and filters that leave out unlikely tokens.

Samplers apply the filters themselves, as one threshold for each row (hal.sampling.sampler).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np

from hal.features.declare import Batch, Feature, Fields
from hal.features.params import Param, Params

if TYPE_CHECKING:
    from hypothesis import strategies as st


class DrawParams(Params):
    temperature: Annotated[float, Param(help="0 is greedy", low=0.0, column="float32")] = 0.0
    seed: Annotated[int | None, Param(help="of sampling", low=-(2**63), high=2**63 - 1, column="int64",
                                      unset="derived from the engine's seed and the request's number")] = None


class TopKParams(Params):
    top_k: Annotated[int, Param(help="keep the most likely K tokens; 0 keeps all", low=0, high=2**31 - 1,
                                column="int32")] = 0


class TopPParams(Params):
    top_p: Annotated[float, Param(help="keep the most likely tokens that make up this probability", low=0.0, high=1.0,
                                  above=True, column="float32")] = 1.0


class MinPParams(Params):
    min_p: Annotated[float, Param(help="drop tokens below this share of the best one's probability", low=0.0, high=1.0,
                                  column="float32")] = 0.0


class Draw(Feature):
    """Present if a sampled sequence has a temperature above 0 or a seed. A row whose temperature is 0 is greedy."""

    params = DrawParams

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        n = len(batch.lens)
        return {"temperature": rng.choice([0.0, 0.5, 2.0], n), "seed": rng.integers(-2**63, 2**63, n)}


class TopK(Feature):
    params = TopKParams
    drawn: ClassVar[bool] = True


class TopP(Feature):
    params = TopPParams
    drawn: ClassVar[bool] = True


class MinP(Feature):
    params = MinPParams
    drawn: ClassVar[bool] = True
