"""The formats of quantised checkpoints, by the `quant_method` of config.json's quantization_config.

A format is a function. It takes that configuration and returns a function from a projection's name to its scheme. The
entry point group `hal.weights` names formats, and so does the environment variable HAL_WEIGHTS
("quant_method=module:function,..."). All ranks of an engine must have the same formats. Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from typing import Any

from hal.errors import ConfigError, ModelLoadError
from hal.extensions import named
from hal.weights.base import LinearSpec, Scheme

GROUP = "hal.weights"
BUILT_IN = {name: f"hal.weights.configs:{name.replace('-', '_')}"
            for name in ("auto-round", "awq", "compressed-tensors", "fp8", "gguf", "gptq", "mxfp4", "on-load")}
SchemeOf = Callable[[str], Scheme]  # of a projection's name, as in the checkpoint without the prefix "model."
Format = Callable[[Mapping[str, Any]], SchemeOf]


def names() -> list[str]:
    return sorted(_entries())


def check_known(quantization: Mapping[str, Any]) -> None:
    """Whether there is a format for a quantization_config. The format's module is not imported.

    Raises:
        ModelLoadError: listing the known ones.
    """
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in _entries():
        known = ", ".join(names())
        raise ModelLoadError("quantization_config in config.json names an unknown format of weights",
                             got=f"quant_method = {method!r:.80}", expected=known or "a checkpoint of dense weights",
                             hint="install the package that provides the format, or take a dense checkpoint")


def schemes(quantization: Mapping[str, Any] | None) -> SchemeOf:
    """What gives the scheme of each projection of a checkpoint; without quantization_config, it is the dense one.

    Raises:
        ConfigError: the format cannot be imported. ModelLoadError: it is unknown, or refuses its configuration.
    """
    from hal.weights.dense import DENSE

    if quantization is None:
        return lambda name: DENSE
    check_known(quantization)
    entry = _entries()[quantization["quant_method"]]
    try:
        found: Format = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the weight format {entry.name!r} cannot be imported",
                          got=f"{type(error).__name__}: {error}", expected=f"{entry.value} is a function",
                          hint="the entry points of hal.weights and the variable HAL_WEIGHTS name formats") from error
    return found(quantization)


def mergeable(spec: LinearSpec, schemes: SchemeOf) -> bool:
    """Whether one layer can hold all of a spec's projections: their schemes are equal, and no entry of a tensor belongs
    to outputs of two projections."""
    found = [schemes(projection.name) for projection in spec.projections]
    dims = [tensor.merged[1] for tensor in found[0].tensors(spec)]
    return all(scheme == found[0] for scheme in found) and not any(
        projection.size % dim.per for projection in spec.projections[:-1] for dim in dims)


def _entries() -> dict[str, EntryPoint]:
    """By quant_method. What the user and packages name comes before what is built in."""
    built_in = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    return {**built_in, **named(GROUP, "HAL_WEIGHTS", "quant_method=module:function")}
