"""The sampling parameters that a checkpoint's generation_config.json recommends. This loads no torch."""

from __future__ import annotations

from os.path import isfile
from pathlib import Path
from typing import Any

from hal.checkpoints.reader import Reader
from hal.checkpoints.stored import read_json, shown
from hal.config import EngineConfig
from hal.errors import ModelLoadError, RequestError
from hal.sampling.params import SamplingParams

FILE = "generation_config.json"
_DRAWING: dict[str, Any] = {"temperature": (int, float), "top_k": int, "top_p": (int, float), "min_p": (int, float)}
_ALWAYS: dict[str, Any] = {"repetition_penalty": (int, float), "max_new_tokens": int}
# Settings by which transformers would choose other tokens, and which requests here do not have.
_UNKNOWN = ("num_beams", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens",
            "begin_suppress_tokens", "stop_strings", "min_length", "min_new_tokens", "typical_p", "epsilon_cutoff",
            "eta_cutoff", "penalty_alpha", "guidance_scale")
_NO_EFFECT = {"num_beams": 1, "typical_p": 1, "guidance_scale": 1}  # of the others 0, or nothing
_HINT = "--generation-config none (generation_config=\"none\") does not read it"


def recommended(config: EngineConfig) -> tuple[dict[str, Any], str]:
    """Read the file, unless generation_config is "none".

    Returns:
        The values for requests that give none, by the names of SamplingParams, as far as they differ from its defaults.
        And for the user: the settings that would choose other tokens, and that requests do not get; empty where the
        file has none.

    As in transformers, nothing is drawn unless the file sets do_sample, and then the temperature is 1 unless the file
    gives one. A filter that the file does not name leaves out nothing.

    Raises:
        ModelLoadError: the file is damaged, or a value is not one that SamplingParams takes.
    """
    path = Path(config.model) / FILE
    if config.generation_config == "none" or not isfile(path):
        return {}, ""
    data = read_json(path)
    read = Reader(data, FILE, _HINT)
    drawn = read.flag(False, "do_sample")
    found = {name: read.get(kind, None, name, null=None) for name, kind in ({**_DRAWING, **_ALWAYS} if drawn else
                                                                            _ALWAYS).items()}
    if drawn and found["temperature"] is None:
        found["temperature"] = 1.0
    if found.get("top_k") is not None:
        found["top_k"] = max(found["top_k"], 0)  # some files have -1 for "no filter"
    found["max_tokens"] = found.pop("max_new_tokens")
    found = {name: value for name, value in found.items() if value is not None}
    try:
        made, plain = SamplingParams(**found), SamplingParams()
    except RequestError as error:
        raise ModelLoadError(f"{FILE} recommends a sampling parameter that cannot be used",
                             got=f"{error.what}: {error.got}", expected=error.expected, hint=_HINT) from error
    ignored = ", ".join(f"{name}={shown(data[name])}" for name in _UNKNOWN
                        if data.get(name) not in (None, [], {}, _NO_EFFECT.get(name, 0)))
    return {name: getattr(made, name) for name in found if getattr(made, name) != getattr(plain, name)}, ignored


def stated(defaults: dict[str, Any]) -> str:
    """One line for the user about values of `recommended` that requests get."""
    values = ", ".join(f"{name}={value}" for name, value in defaults.items())
    return f"the model's {FILE} sets {values} where a request does not; --generation-config none leaves that out"
