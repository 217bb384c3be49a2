"""What files beside a checkpoint's tokenizer say about its class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def settings_of(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer_config.json and of config.json; empty where one is not there or damaged."""
    return _read_object(directory / "tokenizer_config.json"), _read_object(directory / "config.json")


def known_class(directory: Path, settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Options of AutoTokenizer.from_pretrained for a tokenizer whose settings name its class; none for another.

    It would read the model's configuration only to look up the class, and a module of a model's configuration imports
    activations, attention, and with them PyTorch's compiler: 2 to 3 seconds.
    """
    named = isinstance(settings.get("tokenizer_class"), str) and isinstance(config.get("model_type"), str)
    if not named or "auto_map" in settings:
        return {}
    from transformers import PretrainedConfig

    found = PretrainedConfig()
    for name in {"model_type", "tokenizer_class", "model_name"} & config.keys():
        setattr(found, name, config[name])
    found._name_or_path = str(directory)
    return {"config": found}


def own_code(settings: dict[str, Any], config: dict[str, Any]) -> str | None:
    """The name of the checkpoint's own Python class that its tokenizer needs, when transformers has no such class."""
    name, auto = settings.get("tokenizer_class"), settings.get("auto_map")
    own = auto.get("AutoTokenizer") if isinstance(auto, dict) else auto
    if name is None:
        name, auto = config.get("tokenizer_class"), config.get("auto_map")
        own = own or (auto.get("AutoTokenizer") if isinstance(auto, dict) else None)
    if not own:
        return None
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    known = isinstance(name, str) and any(tokenizer_class_from_name(name + end) for end in ("", "Fast"))
    return None if known else str(own)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # transformers says what is wrong with it
        return {}
    return value if isinstance(value, dict) else {}
