"""Adapters with random weights in PEFT's files, and checkpoints into which one is merged. Nothing of hal is used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r"(?:self_attn|attn|mlp|shared_experts)\.\w+\.weight$")


def modules_of(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear maps of decoder layers, by the names that transformers gives the modules."""
    tensors = load_file(checkpoint / "model.safetensors")
    found = {name.removesuffix(".weight"): tuple(w.shape) for name, w in tensors.items() if LINEAR.search(name)
             and w.ndim == 2}
    turned = is_gpt2(checkpoint)
    return {name: (a, b) if turned else (b, a) for name, (a, b) in found.items()}


def is_gpt2(checkpoint: Path) -> bool:
    return bool(json.loads((checkpoint / "config.json").read_text())["model_type"] == "gpt2")


def write(directory: Path, checkpoint: Path, seed: int, *, only: str = "", ranks: dict[str, int] | None = None,
          strength: float = 0.5, **config: Any) -> Path:
    """Write an adapter.

    Args:
        only: an expression that names the modules which it changes. ranks: of modules whose name ends so, in place of
            r. config: fields of adapter_config.json.
    """
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "bias": "none", **config}
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, (size_in, size_out) in modules_of(checkpoint).items():
        if not re.search(only, name):
            continue
        rank = next((r for end, r in (ranks or {}).items() if name.endswith(end)), config["r"])
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, size_in), (size_out, rank)))
        for part, value in (("A", a * size_in ** -0.5), ("B", b * strength * rank ** -0.5)):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = value.contiguous()
    directory.mkdir(parents=True)
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merge(checkpoint: Path, adapter: Path, directory: Path, alphas: dict[str, float] | None = None) -> Path:
    """Write a checkpoint whose weights contain the adapter's products. `alphas`: of modules whose name ends so."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    deltas, tensors = load_file(adapter / "adapter_model.safetensors"), load_file(checkpoint / "model.safetensors")
    for name in [name for name in deltas if name.endswith("lora_A.weight")]:
        a, b = deltas[name], deltas[name.replace("lora_A", "lora_B")]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = next((x for end, x in (alphas or {}).items() if module.endswith(end)), config["lora_alpha"])
        delta = (b.double() @ a.double()) * alpha / len(a) ** (0.5 if config.get("use_rslora") else 1)
        delta = delta.t() if is_gpt2(checkpoint) else delta
        weight = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = (weight.double() + delta).to(weight.dtype).contiguous()
    shutil.copytree(checkpoint, directory)
    save_file(tensors, str(directory / "model.safetensors"), {"format": "pt"})
    return directory
