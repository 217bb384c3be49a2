"""Step features: values that a step carries for each of its sequences, one file a feature. Importing this loads no
torch.

A third party names its `Feature` in the entry point group `hal.features`, or in the variable HAL_FEATURES
("module:Class,module:Class"). All ranks of an engine must have the same features.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

import numpy as np

from hal.errors import ConfigError
from hal.features.adapter import Adapters
from hal.features.bias import LogitBias
from hal.features.declare import Column, Feature
from hal.features.drawing import Draw, MinP, TopK, TopP
from hal.features.logprobs import Logprobs
from hal.features.masks import TokenMasks
from hal.features.penalties import Penalties
from hal.features.pending import Pending
from hal.features.stopping import Stopping
from hal.values import imported


def _third_party() -> Iterable[Feature]:
    names = {point.value for point in entry_points(group="hal.features")}
    names |= {name for name in os.environ.get("HAL_FEATURES", "").split(",") if name}
    for name in sorted(names):
        try:
            kind = imported(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError("a step feature cannot be imported", got=f"{name}: {type(error).__name__}: {error}",
                              expected="module:Class", hint="the entry points of hal.features and the variable "
                              "HAL_FEATURES name step features") from error
        if not (isinstance(kind, type) and issubclass(kind, Feature)):
            raise ConfigError("a step feature is no Feature", got=f"{name}: {kind!r}", expected="a subclass of Feature")
        yield kind()


# In the order in which they change the scores of a token. First come those whose fields a forward pass reads, so that a
# step's input has them at the same place whatever else it carries.
FEATURES: tuple[Feature, ...] = (Pending(), Adapters(), Penalties(), LogitBias(), TokenMasks(), Draw(), TopK(), TopP(),
                                 MinP(), Logprobs(), Stopping(), *_third_party())
ADJUSTING = tuple(f for f in FEATURES if type(f).adjust is not Feature.adjust)
FOR_SAMPLING = tuple(f for f in FEATURES if f.for_sampling)
COLUMNS: Mapping[str, tuple[Column, ...]] = {kind: tuple(c for f in FEATURES for c in f.columns if c.kind == kind)
                                             for kind in ("float", "int")}


def needs_tokens(params: Any) -> bool:
    """Whether a sequence with these SamplingParams can only be scheduled when all its tokens are known on the host."""
    return any(getattr(params, c.name) != c.default for f in FEATURES if f.needs_tokens for c in f.columns)


def adjusting(model_input: Any) -> list[Feature]:
    """The features of a step that change scores before a token is chosen, in their order."""
    return [f for f in ADJUSTING if f.present(model_input)]


def input_annotations(features: Iterable[Feature] = FEATURES) -> dict[str, Any]:
    """Annotations and defaults of a step input's fields, for `Declared`."""
    import torch

    arrays = {name: (Annotated[torch.Tensor | None, array], None) for f in features for name, array in f.fields.items()}
    return arrays | {name: (Annotated[int, doc], default) for f in features
                     for name, (default, doc) in f.scalars.items()}


def request_annotations(features: Iterable[Feature] = FEATURES) -> dict[str, Any]:
    """Annotations and defaults of the fields that features add to ExecuteModelRequest; their arrays are numpy's."""
    return {name: (Annotated[np.ndarray | None, array], None) for f in features for name, array in f.request.items()}
