"""Fill a model from safetensors files, each rank reading only its slices; or with random values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hal.communicator import LocalCommunicator
from hal.config import Topology
from hal.errors import ModelLoadError
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.checkpoint import HEAD, Stored, equal, locate, open_file, open_tensor, shown
from hal.models.layers import Source, placement
from hal.models.ops import Ops
from hal.runner import Progress, no_progress

# Constants that older transformers saved beside the weights.
_HARMLESS = re.compile(r"(\.rotary_emb\.inv_freq|^h\.\d+\.attn\.(bias|masked_bias))$")
_DTYPES = ("F64", "F32", "F16", "BF16")
_POOL = 4_194_301  # a prime, so that rows of equal values don't line up


def load_weights(model: CausalLM, directory: str | Path, progress: Progress = no_progress) -> None:
    """Fill every parameter from the tensors that `hal.models.checkpoint.locate` finds.

    Args:
        model: of a configuration that `read_config` read from this directory. Where it ties embeddings and head, the
            checkpoint may have either or both.
        progress: called with ("loading weights", tensors read, tensors to read).

    Raises:
        ModelLoadError: a file is missing, truncated or corrupt; a tensor is missing, unknown, of the wrong shape or not
            floating point; a vector (a norm's weight or a bias) has a value that is not finite in the model's dtype.
            Names the file and the tensor.
    """
    directory = Path(directory)
    tensors = locate(directory)
    if model.config.tie_embeddings:
        _tie(model, tensors)
    _refuse_unknown(model, tensors)
    work = [(p, s, at) for p in model.parameters() for s, at in _parts(p, model.topology)]
    files: dict[Path, safe_open] = {}
    with ExitStack() as stack:
        for done, (parameter, source, at) in enumerate(work):
            progress("loading weights", done, len(work))
            stored = tensors.get(source.name)
            if stored is None:
                raise _missing(source.name, model, directory)
            if stored.path not in files:
                files[stored.path] = stack.enter_context(open_file(stored.path, "pt"))
            _fill(parameter, source, at, stored, files[stored.path], model.topology)
    progress("loading weights", len(work), len(work))
    model.pack()


def _missing(name: str, model: CausalLM, directory: Path) -> ModelLoadError:
    hint = "the checkpoint is incomplete, or its config.json belongs to another model"
    if name == HEAD:
        hint = ("the checkpoint is incomplete; if the model was trained with one table for embeddings and head, set "
                "tie_word_embeddings to true in config.json")
    return ModelLoadError(f"the checkpoint lacks the tensor {name!r}", got=directory, hint=hint)


def _tie(model: CausalLM, tensors: dict[str, Stored]) -> None:
    """Keep the one table, whichever name it has, under the name of the embeddings."""
    name, head = f"{model.config.embedding_name}.weight", tensors.pop(HEAD, None)
    if head is None:
        return
    if name not in tensors:
        tensors[name] = head
    elif model.topology.is_driver and not equal(tensors[name], head):  # the ranks read the same files: one compares
        raise ModelLoadError("the checkpoint has a head that differs from its embeddings, but the model's "
                             "configuration ties them", got=f"{HEAD} in {head.path}",
                             hint="take the configuration from read_config, which looks at the stored tensors")


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


def _refuse_unknown(model: CausalLM, tensors: dict[str, Stored]) -> None:
    """A tensor that no part of the whole model reads would change its results if it were used: refuse it."""
    whole = build_model(model.config, Topology(), LocalCommunicator(), Ops(), model.dtype, torch.device("meta"))
    known = {s.name for p in whole.parameters() for s in placement(p).sources}
    unknown = [name for name in tensors if name not in known and not _HARMLESS.search(name)]
    if unknown:
        first, others = tensors[unknown[0]], len(unknown) - 1
        raise ModelLoadError(f"the checkpoint has a tensor that {model.config.architecture} as configured does not use",
                             got=f"{shown(first.name)} in {first.path}" + (f" and {others} more" if others else ""),
                             hint="config.json does not belong to these weights, or asks for too little")


def _fill(parameter: nn.Parameter, source: Source, at: int, stored: Stored, file: safe_open,
          topology: Topology) -> None:
    dim, where = placement(parameter).dim or 0, f"the tensor {stored.name!r} in {stored.path.name}"
    first, last = source.local(topology)
    tensor = open_tensor(file, stored)
    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    wanted = source.shape[::-1] if source.transposed else source.shape
    if shape != wanted:
        raise ModelLoadError(f"{where} has the wrong shape", got=list(shape), expected=list(wanted),
                             hint="config.json does not belong to these weights")
    if dtype not in _DTYPES:
        raise ModelLoadError(f"{where} has an unsupported dtype", got=dtype, expected=", ".join(_DTYPES))
    rows = slice(first, last)
    try:
        value = tensor[:, rows] if (dim == 1) != source.transposed and len(shape) == 2 else tensor[rows]
    except SafetensorError as error:
        raise ModelLoadError(f"{where} cannot be read", got=f"{stored.path}: {error}") from None
    into = parameter.data
    if len(shape) == 1:
        value = _finite(value.to(into.dtype), where)
    into.narrow(dim, at, last - first).copy_(value.t() if source.transposed and len(shape) == 2 else value)
    end = at + last - first
    if source is placement(parameter).sources[-1] and end < into.shape[dim]:
        into.narrow(dim, end, into.shape[dim] - end).zero_()


def _finite(vector: torch.Tensor, where: str) -> torch.Tensor:
    """Norms and biases alone are checked: they cost nothing, and of a matrix it would be a second pass over memory."""
    finite = vector.isfinite()
    if not finite.all():
        at = int(finite.logical_not().nonzero()[0])
        dtype = str(vector.dtype).removeprefix("torch.")
        raise ModelLoadError(f"{where} has values that are not finite in {dtype}",
                             got=f"{vector[at].item()} at {at}, {int(finite.logical_not().sum())} of {len(vector)}",
                             hint="the checkpoint is damaged" if dtype != "float16" else
                                  "the checkpoint is damaged, or its values need dtype bfloat16 or float32")
    return vector
