"""Fill a model from safetensors files, each rank reading only its slices; or with random values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hal.communicator import LocalCommunicator
from hal.config import Topology
from hal.errors import ModelLoadError
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.layers import Source, placement
from hal.models.ops import Ops
from hal.runner import Progress, no_progress

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIX = re.compile(r"^(model|transformer)\.")
# Constants that older transformers saved beside the weights.
_HARMLESS = re.compile(r"(\.rotary_emb\.inv_freq|^h\.\d+\.attn\.(bias|masked_bias))$")
_DTYPES = ("F64", "F32", "F16", "BF16")
_POOL = 4_194_301  # a prime, so that rows of equal values don't line up


def load_weights(model: CausalLM, directory: str | Path, progress: Progress = no_progress) -> None:
    """Fill every parameter from model.safetensors, or from the shards that model.safetensors.index.json lists.

    Args:
        progress: called with ("loading weights", tensors read, tensors to read).

    Raises:
        ModelLoadError: a file is missing, truncated or corrupt; a tensor is missing, unknown, of the wrong shape or not
            floating point. Names the file and the tensor.
    """
    directory = Path(directory)
    work = [(p, s, at) for p in model.parameters() for s, at in _parts(p, model.topology)]
    with ExitStack() as stack:
        tensors = _open(directory, stack)
        _refuse_unknown(model, tensors)
        for done, (parameter, source, at) in enumerate(work):
            progress("loading weights", done, len(work))
            found = tensors.get(source.name)
            if found is None:
                raise ModelLoadError(f"the checkpoint lacks the tensor {source.name!r}", got=directory,
                                     hint="the checkpoint is incomplete, or its config.json belongs to another model")
            _fill(parameter, source, at, *found, model.topology)
    progress("loading weights", len(work), len(work))
    model.pack()


def random_weights(model: CausalLM, seed: int = 0) -> None:
    """Fill every parameter with normal values of deviation 0.02, norms' weights with 1. Quick rather than random: all
    parameters are cut from one pool of values, each at another place. Ranks get values of their own."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(_POOL).normal_(0.0, 0.02, generator=generator).to(device, model.dtype)
    at = model.topology.rank
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.ndim == 1 and placement(parameter).sources[0].name.endswith("weight"):
            flat.fill_(1.0)
            continue
        begin = 0
        while begin < flat.numel():
            count = min(flat.numel() - begin, _POOL - at)
            flat[begin:begin + count] = pool[at:at + count]
            begin, at = begin + count, (at + count) % _POOL
    model.pack()


def _parts(parameter: nn.Parameter, topology: Topology) -> Iterator[tuple[Source, int]]:
    """A parameter's sources, and where along the sharded dimension each begins in it."""
    at = 0
    for source in placement(parameter).sources:
        yield source, at
        first, last = source.local(topology)
        at += last - first


def _open(directory: Path, stack: ExitStack) -> dict[str, tuple[str, Path, Any]]:
    """Canonical tensor name -> (its name in the file, the file, the open file)."""
    tensors: dict[str, tuple[str, Path, Any]] = {}
    for path in _files(directory):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
        except FileNotFoundError:
            raise ModelLoadError(f"the checkpoint file {path.name} is missing", got=path,
                                 hint="download the checkpoint again") from None
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"the checkpoint file {path.name} is damaged", got=f"{path}: {error}",
                                 expected="a complete safetensors file", hint="download it again") from None
        for name in names:
            canonical = _PREFIX.sub("", name)
            if canonical in tensors:
                first, at, _ = tensors[canonical]
                raise ModelLoadError(f"the checkpoint has the tensor {canonical!r} twice",
                                     got=f"{first} in {at.name}, {name} in {path.name}")
            tensors[canonical] = name, path, file
    return tensors


def _files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    index = directory / _INDEX
    if not index.is_file():
        others = sorted(p.name for p in directory.glob("*.bin")) if directory.is_dir() else []
        raise ModelLoadError("the model directory has no weights", got=f"{directory}" + (
                             f" with {', '.join(others)}" if others else ""), expected=f"{_SINGLE} or {_INDEX}",
                             hint="save it with save_pretrained(..., safe_serialization=True)" if others else None)
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [directory / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"{_INDEX} is damaged", got=f"{index}: {type(error).__name__}: {error}",
                             expected="a JSON object with weight_map") from None


def _refuse_unknown(model: CausalLM, tensors: dict[str, tuple[str, Path, Any]]) -> None:
    """A tensor that no part of the whole model reads would change its results if it were used: refuse it."""
    whole = build_model(model.config, Topology(), LocalCommunicator(), Ops(), model.dtype, torch.device("meta"))
    known = {s.name for p in whole.parameters() for s in placement(p).sources}
    if model.config.tie_embeddings:
        known.add("lm_head.weight")
    unknown = [name for name in tensors if name not in known and not _HARMLESS.search(name)]
    if unknown:
        name, path, _ = tensors[unknown[0]]
        raise ModelLoadError(f"the checkpoint has a tensor that {model.config.architecture} as configured does not use",
                             got=f"{name} in {path}" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""),
                             hint="config.json does not belong to these weights, or asks for too little")


def _fill(parameter: nn.Parameter, source: Source, at: int, name: str, path: Path, file: Any,
          topology: Topology) -> None:
    dim = placement(parameter).dim or 0
    first, last = source.local(topology)
    try:
        stored = file.get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        wanted = source.shape[::-1] if source.transposed else source.shape
        if shape != wanted:
            raise ModelLoadError(f"the tensor {name!r} in {path.name} has the wrong shape", got=list(shape),
                                 expected=list(wanted), hint="config.json does not belong to these weights")
        if dtype not in _DTYPES:
            raise ModelLoadError(f"the tensor {name!r} in {path.name} has an unsupported dtype", got=dtype,
                                 expected=", ".join(_DTYPES))
        rows = slice(first, last)
        value = stored[:, rows] if (dim == 1) != source.transposed and len(shape) == 2 else stored[rows]
    except SafetensorError as error:
        raise ModelLoadError(f"the tensor {name!r} in {path.name} cannot be read", got=f"{path}: {error}") from None
    into = parameter.data
    into.narrow(dim, at, last - first).copy_(value.t() if source.transposed and len(shape) == 2 else value)
    end = at + last - first
    if source is placement(parameter).sources[-1] and end < into.shape[dim]:
        into.narrow(dim, end, into.shape[dim] - end).zero_()
