"""Fill a model from safetensors files, each rank reading only its slices; or with random values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hal.checkpoints.stored import HEAD, Stored, equal, locate, open_file, open_tensor, shown
from hal.config import Topology
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.runner import Progress, no_progress
from hal.errors import ModelLoadError
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.layers import Source, placement
from hal.models.ops import Ops

# Constants that older transformers saved beside the weights.
_HARMLESS = re.compile(r"(\.rotary_emb\.inv_freq|^h\.\d+\.attn\.(bias|masked_bias))$")
_DTYPES = ("F64", "F32", "F16", "BF16")
_POOL = 4_194_301  # a prime, so that rows of equal values don't line up


def check_weights(config: ModelConfig, directory: str | Path) -> dict[str, Stored]:
    """Find all tensors of the whole model in a directory, and check that there are no others. Reads headers alone, so
    that a config.json which does not belong to the weights is refused before memory for the model is allocated.

    Returns:
        Tensor name -> where it is stored. Where `config` ties embeddings and head, the checkpoint may have the table
        under either name or both; here it has that of the embeddings.

    Raises:
        ModelLoadError: a file is missing, truncated or corrupt; a tensor is missing, unknown, of the wrong shape or not
            floating point. Names the file and the tensor.
    """
    directory = Path(directory)
    tensors = locate(directory)
    if config.tie_embeddings and (head := tensors.pop(HEAD, None)):
        tensors.setdefault(f"{config.embedding_name}.weight", head)
    sources = _sources(config)
    _refuse_unknown(config, tensors, sources)
    with ExitStack() as stack:
        files: dict[Path, safe_open] = {}
        for name, source in sources.items():
            stored = tensors.get(name)
            if stored is None:
                raise _missing(name, directory)
            if stored.path not in files:
                files[stored.path] = stack.enter_context(open_file(stored.path, "np"))
            _check_tensor(source, stored, files[stored.path])
    return tensors


def load_weights(model: CausalLM, directory: str | Path, progress: Progress = no_progress) -> None:
    """Fill every parameter from a checkpoint.

    Args:
        model: of a configuration that `read_config` read from this directory.
        progress: called with ("loading weights", tensors read, tensors to read).

    Raises:
        ModelLoadError: as check_weights does; a vector (a norm's weight or a bias) has a value that is not finite in
            the model's dtype; the configuration ties embeddings and head, and the checkpoint's differ.
    """
    directory = Path(directory)
    tensors = check_weights(model.config, directory)
    if model.config.tie_embeddings and model.topology.is_driver:  # ranks read the same files: one of them compares
        _refuse_other_head(tensors[f"{model.config.embedding_name}.weight"], locate(directory).get(HEAD))
    work = [(p, s, at) for p in model.parameters() for s, at in _parts(p, model.topology)]
    with ExitStack() as stack:
        files: dict[Path, safe_open] = {}
        for done, (parameter, source, at) in enumerate(work):
            progress("loading weights", done, len(work))
            stored = tensors[source.name]
            if stored.path not in files:
                files[stored.path] = stack.enter_context(open_file(stored.path, "pt"))
            _fill(parameter, source, at, stored, files[stored.path], model.topology)
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


def _sources(config: ModelConfig) -> dict[str, Source]:
    """All tensors that the whole model reads; of several sources in one tensor, the last."""
    whole = build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("meta"))
    return {s.name: s for p in whole.parameters() for s in placement(p).sources}


def _refuse_unknown(config: ModelConfig, tensors: dict[str, Stored], known: dict[str, Source]) -> None:
    """A tensor that no part of the whole model reads would change its results if it were used: refuse it."""
    unknown = [name for name in tensors if name not in known and not _HARMLESS.search(name)]
    if unknown:
        first, others = tensors[unknown[0]], len(unknown) - 1
        raise ModelLoadError(f"the checkpoint has a tensor that {config.architecture} as configured does not use",
                             got=f"{shown(first.name)} in {first.path}" + (f" and {others} more" if others else ""),
                             hint="config.json does not belong to these weights, or asks for too little")


def _missing(name: str, directory: Path) -> ModelLoadError:
    hint = "the checkpoint is incomplete, or its config.json belongs to another model"
    if name == HEAD:
        hint = ("the checkpoint is incomplete; if the model was trained with one table for embeddings and head, set "
                "tie_word_embeddings to true in config.json")
    return ModelLoadError(f"the checkpoint lacks the tensor {name!r}", got=directory, hint=hint)


def _check_tensor(source: Source, stored: Stored, file: safe_open) -> None:
    tensor = open_tensor(file, stored)
    wanted = source.shape[::-1] if source.transposed else source.shape
    if tuple(tensor.get_shape()) != wanted:
        raise ModelLoadError(f"{_at(stored)} has the wrong shape", got=tensor.get_shape(), expected=list(wanted),
                             hint="config.json does not belong to these weights")
    if tensor.get_dtype() not in _DTYPES:
        raise ModelLoadError(f"{_at(stored)} has an unsupported dtype", got=tensor.get_dtype(),
                             expected=", ".join(_DTYPES))


def _refuse_other_head(embeddings: Stored, head: Stored | None) -> None:
    if head is not None and head != embeddings and not equal(embeddings, head):
        raise ModelLoadError("the checkpoint has a head that differs from its embeddings, but the model's "
                             "configuration ties them", got=_at(head),
                             hint="take the configuration from read_config, which looks at the stored tensors")


def _at(stored: Stored) -> str:
    return f"the tensor {stored.name!r} in {stored.path.name}"


def _fill(parameter: nn.Parameter, source: Source, at: int, stored: Stored, file: safe_open,
          topology: Topology) -> None:
    dim, matrix = placement(parameter).dim or 0, len(source.shape) == 2
    first, last = source.local(topology)
    tensor, rows = open_tensor(file, stored), slice(first, last)
    try:
        value = tensor[:, rows] if matrix and (dim == 1) != source.transposed else tensor[rows]
    except SafetensorError as error:
        raise ModelLoadError(f"{_at(stored)} cannot be read", got=f"{stored.path}: {error}") from None
    into = parameter.data
    if not matrix:
        value = _finite(value.to(into.dtype), stored)
    into.narrow(dim, at, last - first).copy_(value.t() if matrix and source.transposed else value)
    end = at + last - first
    if source is placement(parameter).sources[-1] and end < into.shape[dim]:
        into.narrow(dim, end, into.shape[dim] - end).zero_()


def _finite(vector: torch.Tensor, stored: Stored) -> torch.Tensor:
    """Norms and biases alone are checked: they cost nothing, and of a matrix it would be a second pass over memory."""
    finite = vector.isfinite()
    if not finite.all():
        at = int(finite.logical_not().nonzero()[0])
        dtype = str(vector.dtype).removeprefix("torch.")
        raise ModelLoadError(f"{_at(stored)} has values that are not finite in {dtype}",
                             got=f"{vector[at].item()} at {at}, {int(finite.logical_not().sum())} of {len(vector)}",
                             hint="the checkpoint is damaged" if dtype != "float16" else
                                  "the checkpoint is damaged, or its values need dtype bfloat16 or float32")
    return vector
