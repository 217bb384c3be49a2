"""From hidden states to embeddings: pooling, linear layers and normalisation, in fp32."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hal.checkpoints.stored import open_file, shown
from hal.errors import ModelLoadError
from hal.model_config import DenseConfig, EmbeddingConfig

_ACTIVATIONS = {"identity": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


def pool(hidden: torch.Tensor, kind: str) -> torch.Tensor:
    """Hidden states of texts of one length, [count, length, hidden_size] -> [count, hidden_size] fp32."""
    if kind in ("cls", "last"):
        return hidden[:, 0 if kind == "cls" else -1].float()
    x = hidden.float()
    if kind == "max":
        return x.amax(1)
    return x.mean(1) if kind == "mean" else x.sum(1) / x.shape[1] ** 0.5


class Finish(nn.Module):
    """What follows the pooling: [count, hidden_size] fp32 -> embeddings [count, dim] fp32.

    Args:
        directory: of the checkpoint, from which the weights are read; None leaves them at random values.

    Raises:
        ModelLoadError: a layer's weights are missing, damaged or of another shape.
    """

    def __init__(self, config: EmbeddingConfig, directory: str | None, device: torch.device) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.layers = nn.ModuleList()
        for dense in config.dense:
            linear = nn.Linear(dense.in_size, dense.out_size, dense.bias)
            if directory is not None:
                _fill(linear, Path(directory) / dense.folder / "model.safetensors", dense)
            self.layers.append(nn.Sequential(linear, _ACTIVATIONS[dense.activation]()))
        self.to(device).eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.normalize(x, dim=-1) if self.normalise else x


def _fill(linear: nn.Linear, path: Path, dense: DenseConfig) -> None:
    with open_file(path, "pt") as file:
        names = {f"linear.{name}": parameter for name, parameter in linear.named_parameters()}
        if set(file.keys()) != set(names):
            raise ModelLoadError(f"the dense module {dense.folder} has other tensors than its config.json says",
                                 got=shown(sorted(file.keys())), expected=", ".join(names))
        for name, parameter in names.items():
            value = file.get_tensor(name)
            if value.shape != parameter.shape:
                raise ModelLoadError(f"the tensor {name!r} of the dense module {dense.folder} has the wrong shape",
                                     got=list(value.shape), expected=list(parameter.shape))
            parameter.data.copy_(value)
