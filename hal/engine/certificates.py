"""The table of certificates that comes with hal, and the admission of a checkpoint to the Transformers backend."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hal.engine.tiny import SIZES, tiny_config
from hal.errors import ConfigError, ModelLoadError
from hal.model_config import ModelConfig

TABLE = Path(__file__).parent.parent / "assets" / "certificates.json"
_NOT_OPTIONS = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type",
                "auto_map", "use_cache", "quantization_config", "_attn_implementation", "_experts_implementation",
                "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type",
                "is_encoder_decoder", "is_decoder", "chunk_size_feed_forward", "tie_word_embeddings", "name_or_path"}


@cache
def table() -> dict[str, Any]:
    """The content of the table: "transformers", the release it was made with, and "types", a row by model_type."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def options_of(config: Any) -> dict[str, Any]:
    """The settings of a configuration that choose code paths: flags, names, and which sizes are not given at all."""
    chosen: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if (name in SIZES and value is not None) or name in _NOT_OPTIONS or name.endswith(("token_id", "dropout")):
            continue
        if isinstance(value, (bool, str)) or value is None:
            chosen[name] = value
        elif name == "layer_types":
            chosen[name] = sorted(set(value))
        elif name == "rope_parameters":
            parts = [value, *(v for v in value.values() if isinstance(v, dict))]
            chosen[name] = sorted({str(p["rope_type"]) for p in parts if "rope_type" in p})
    return chosen


def admit(config: ModelConfig, tp: int = 1, pp: int = 1) -> None:
    """Let a model of the Transformers backend run in a topology, or refuse it. An architecture or options that the
    table does not have are certified now, which takes seconds. For a checkpoint's own code there is a warning instead.

    Raises:
        ModelLoadError: the architecture is not right on this engine, saying what failed.
    """
    if config.source is None:
        return
    import transformers

    from hal.engine.certify import certify, certifying

    if certifying.get():
        return
    if config.code is not None:
        warnings.warn(f"{config.architecture} is the checkpoint's own code: no certificate says that its results on "
                      f"this engine are right", stacklevel=3)
        return
    kind, asked = config.source["model_type"], [name for name, size in (("tp2", tp), ("pp2", pp)) if size > 1]
    row = table()["types"].get(kind)
    if row is None or table()["transformers"] != transformers.__version__ or row["options"] != _options(config):
        row = certify(kind, config.source, topologies=asked).row()
    if not row["admitted"]:
        raise _refusal(config, row["reason"])
    for name in asked:
        if row[name] not in ("held", "not tried"):
            raise _refusal(config, f"with {name[:2]}: {row[name]}")


def _options(config: ModelConfig) -> dict[str, Any]:
    """Those of a checkpoint; none where its configuration cannot be made small, as in the row of such a type."""
    assert config.source is not None
    try:
        return options_of(tiny_config(config.source["model_type"], config.source))
    except ConfigError:
        return {}


def _refusal(config: ModelConfig, reason: str) -> ModelLoadError:
    return ModelLoadError(f"{config.architecture} is not certified for the Transformers backend", got=reason,
                          expected="results equal to those of transformers' own forward pass",
                          hint="hal certify repeats the comparison; docs/architectures.md lists what is admitted")


def markdown(content: Mapping[str, Any] | None = None) -> str:
    """docs/architectures.md of a table; None: of the one that comes with hal."""
    content = table() if content is None else content
    rows = content["types"]
    admitted = {kind: row for kind, row in rows.items() if row["admitted"]}
    lines = ["# Architectures of the Transformers backend", "",
             f"`hal certify` made this page with transformers {content['transformers']}: {len(admitted)} types are "
             f"admitted, {len(rows) - len(admitted)} are refused.",
             "[transformers.md](transformers.md) says what a certificate is.", "", "## Admitted", "",
             "The error is the largest difference of a logprob from transformers in fp64. The control is the same for "
             "a run that ignores its cache.", "", "| type | class | error | control | tp=2 | pp=2 |",
             "| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {kind} | {row['architecture']} | {row['error']:.0e} | {row['control']:.1f} | {_cell(row['tp2'])} | "
              f"{_cell(row['pp2'])} |" for kind, row in admitted.items()]
    devices = content.get("devices", {})
    if devices:
        lines += ["", "## On other devices", "", "`hal certify TYPE --device NAME` admitted these, on one "
                  "device.", "", "| device | type | error | control |", "| --- | --- | --- | --- |"]
    for device, found in devices.items():
        lines += [f"| {device} | {kind} | {row['error']:.0e} | {row['control']:.1f} |" for kind, row in found.items()
                  if row["admitted"]]
    lines += ["", "## Refused", "", "| type | reason |", "| --- | --- |"]
    lines += [f"| {kind} | {_cell(row['reason'])} |" for kind, row in rows.items() if not row["admitted"]]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("the Transformers backend cannot run ", "")
