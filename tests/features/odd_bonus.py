"""A step feature of a third party: one module. `HAL_FEATURES=odd_bonus:OddBonus` makes it known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from hal.features.declare import Feature
from hal.features.params import Param, Params

if TYPE_CHECKING:
    import torch


class OddBonusParams(Params):
    odd_bonus: Annotated[float, Param(help="added to the logits of tokens with an odd id", low=0.0, high=1e6,
                                       column="float32")] = 0.0


class OddBonus(Feature):
    params = OddBonusParams

    def adjust(self, scores: torch.Tensor, model_input: Any) -> torch.Tensor:
        scores[:, 1::2] += model_input["odd_bonus"][:len(scores), None]
        return scores
