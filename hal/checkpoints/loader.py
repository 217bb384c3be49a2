"""Fill a model from safetensors files, of which each rank reads only its slices, or with random values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hal.checkpoints.stored import HEAD, Stored, equal, locate, open_file, open_tensor, shown
from hal.config import Topology, WorkerConfig
from hal.contracts.communicator import Communicator, LocalCommunicator
from hal.contracts.runner import Progress, no_progress
from hal.errors import ModelLoadError
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.layers import LinearWeight
from hal.models.ops import Ops
from hal.weights.sharding import ParameterSpec, StoredSlice, pieces, spec_of

# Constants that older transformers saved beside the weights.
_HARMLESS = re.compile(r"(\.rotary_emb\.inv_freq|^h\.\d+\.attn\.(bias|masked_bias))$")
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # converted
_OTHERS = {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
           torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # stored as declared
_AT_ONCE = 1 << 24  # values of a dense weight that are rounded at a time, by way of fp32
_POOL = 4_194_301  # a prime number, so that equal values do not fall into the same column


@dataclass(frozen=True, slots=True)
class _Expected:
    """A stored tensor that the model reads, and the dtype of the parameter that it goes to."""

    source: StoredSlice
    dtype: torch.dtype


def check_weights(config: ModelConfig, directory: str | Path) -> dict[str, Stored]:
    """Find all tensors of the whole model in a directory, and check that there are no others. Only headers are read, so
    that a config.json which does not belong to the weights is refused before memory for the model is allocated.

    Returns:
        Tensor name -> where it is stored. Where `config` ties embeddings and head, the checkpoint may store the table
        under either name or under both. The result has it under the name of the embeddings.

    Raises:
        ModelLoadError: a file is missing, truncated or corrupt; a tensor is missing, unknown, of the wrong shape or of
            the wrong dtype. Names the file and the tensor.
    """
    directory = Path(directory)
    tensors = locate(directory)
    if config.tie_embeddings and (head := tensors.pop(HEAD, None)):
        tensors.setdefault(f"{config.embedding_name}.weight", head)
    expected, ignored = _expected(config)
    _refuse_unknown(config, tensors, expected.keys() | ignored)
    with ExitStack() as stack:
        files: dict[Path, safe_open] = {}
        for name, wanted in expected.items():
            stored = tensors.get(name)
            if stored is None:
                raise _missing(name, directory)
            if stored.path not in files:
                files[stored.path] = stack.enter_context(open_file(stored.path, "np"))
            _check_tensor(wanted, stored, files[stored.path])
    return tensors


def load_weights(model: CausalLM, directory: str | Path, progress: Progress = no_progress, *,
                 checked: Mapping[str, Stored] | None = None) -> None:
    """Fill every parameter from a checkpoint.

    Args:
        model: of a configuration that `read_config` read from this directory.
        progress: called with ("loading weights", tensors read, tensors to read).
        checked: the result of check_weights for this directory, where it was called before.

    Raises:
        ModelLoadError: as check_weights does; a vector (a norm's weight or a bias) has a value that is not finite in
            the model's dtype; an index is out of its range; the configuration ties embeddings and head, and the
            checkpoint's differ.
    """
    directory = Path(directory)
    tensors = check_weights(model.config, directory) if checked is None else checked
    if model.config.tie_embeddings and model.topology.is_driver:  # all ranks read the same files, so one compares
        _refuse_other_head(tensors[f"{model.config.embedding_name}.weight"], locate(directory).get(HEAD))
    work = [(into, spec, s, at) for p in model.parameters() for into, spec in pieces(p)
            for s, at in _parts(spec, model.topology)]
    with _Files(tensors) as files:
        for done, (into, spec, source, at) in enumerate(work):
            progress("loading weights", done, len(work))
            _fill(into, spec, source, at, *files.opened(source.name), model.topology)
    progress("loading weights", len(work), len(work))
    _quantize(model, tensors, progress)
    model.pack()


class _Files:
    """The files of tensors, each opened when it is first needed and closed at the end of the context."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors, self.files, self.stack = tensors, dict[Path, safe_open](), ExitStack()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def opened(self, name: str) -> tuple[Stored, safe_open]:
        stored = self.tensors[name]
        if stored.path not in self.files:
            self.files[stored.path] = self.stack.enter_context(open_file(stored.path, "pt"))
        return stored, self.files[stored.path]


def _quantize(model: CausalLM, tensors: Mapping[str, Stored], progress: Progress) -> None:
    """Make the tensors of layers whose scheme is `on_load`. One dense weight exists at a time, and its file is mapped
    into memory for as long."""
    layers = [module for module in model.modules() if isinstance(module, LinearWeight) and module.dense]
    for done, layer in enumerate(layers):
        progress("quantizing weights", done, len(layers))
        with _Files(tensors) as files:
            for i, (shape, spec) in enumerate(layer.dense):
                dense = torch.empty(shape, dtype=model.dtype, device=next(layer.parameters()).device)
                for source, at in _parts(spec, model.topology):
                    _fill(dense, spec, source, at, *files.opened(source.name), model.topology)
                for at in range(0, len(dense), step := max(_AT_ONCE // dense.shape[1], 1)):
                    for name, value in layer.scheme.quantize(dense[at:at + step]).items():
                        layer.entry(name, i)[at:at + step].copy_(value)
    if layers:
        progress("quantizing weights", len(layers), len(layers))


def random_weights(model: CausalLM, seed: int = 0) -> None:
    """Fill every parameter with normal values of deviation 0.02, norms' weights with 1, and integers with any bits or,
    where they have a range, with values inside it. All parameters are cut from one pool of values, each at another
    place, which is quick but far from random. Ranks get values of their own."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    pools = {0: torch.empty(_POOL).normal_(0.0, 0.02, generator=generator).to(device, model.dtype)}
    at = model.topology.rank
    for parameter in model.parameters():
        flat, spec = parameter.data.view(-1), spec_of(parameter)
        if parameter.ndim == 1 and spec.sources and flat.is_floating_point() and (
                spec.sources[0].name.endswith(("weight", ".k_scale"))):
            flat.fill_(1.0)
            continue
        below = 0 if flat.is_floating_point() else spec.below or torch.iinfo(flat.dtype).max
        if below not in pools:
            pools[below] = torch.randint(0, below, (_POOL,), generator=generator, dtype=flat.dtype).to(device)
        begin = 0
        while begin < flat.numel():
            count = min(flat.numel() - begin, _POOL - at)
            flat[begin:begin + count] = pools[below][at:at + count]
            begin, at = begin + count, (at + count) % _POOL
    model.pack()


def load_model(config: WorkerConfig, communicator: Communicator, ops: Ops, dtype: torch.dtype, device: torch.device,
               progress: Progress = no_progress) -> CausalLM:
    """A rank's part of the engine's model, with its weights. The checkpoint is checked before memory is allocated.
    Raises as build_model, check_weights and load_weights do."""
    engine = config.engine
    checked = None if engine.random_weights else check_weights(config.model, engine.model)
    model = build_model(config.model, config.topology, communicator, ops, dtype, device, config.max_model_len)
    if engine.random_weights:
        random_weights(model, engine.seed)
    else:
        load_weights(model, engine.model, progress, checked=checked)
    return model


def _parts(spec: ParameterSpec, topology: Topology) -> Iterator[tuple[StoredSlice, int]]:
    """A tensor's sources, and where along the filled dimension each begins in it."""
    at = 0
    axis = topology.axis(spec.mesh_axis)
    for source in spec.sources:
        yield source, at
        first, last = source.local(axis)
        at += last - first


def _expected(config: ModelConfig) -> tuple[dict[str, _Expected], set[str]]:
    """All stored tensors that the whole model reads, and the names of others that may be there without effect."""
    whole = build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("meta"))
    linears = [m for m in whole.modules() if isinstance(m, LinearWeight)]
    ignored = {f"{name}.{tensor}" for m in linears if m.scheme.ignored for name in m.names()
               for tensor in m.scheme.ignored}
    expected = {s.name: _Expected(s, p.dtype) for p in whole.parameters() for _, spec in pieces(p)
                for s in spec.sources}
    expected |= {s.name: _Expected(s, torch.float32) for m in linears for _, spec in m.dense for s in spec.sources}
    return expected, ignored.union(whole.ignored)


def _refuse_unknown(config: ModelConfig, tensors: dict[str, Stored], known: set[str]) -> None:
    """Refuse a tensor that no part of the model reads: whoever stored it expects it to change the results."""
    beginnings = tuple(name for name in known if name.endswith("."))
    unknown = [name for name in tensors if name not in known and not _HARMLESS.search(name)
               and not name.startswith(beginnings)]
    if unknown:
        first, others = tensors[unknown[0]], len(unknown) - 1
        raise ModelLoadError(f"the checkpoint has a tensor that {config.architecture} as configured does not use",
                             got=f"{shown(first.name)} in {first.path}" + (f" and {others} more" if others else ""),
                             hint="config.json does not belong to these weights, or describes only some of them")


def _missing(name: str, directory: Path) -> ModelLoadError:
    hint = "the checkpoint is incomplete, or its config.json belongs to another model"
    if name == HEAD:
        hint = ("the checkpoint is incomplete; if the model was trained with one table for embeddings and head, set "
                "tie_word_embeddings to true in config.json")
    return ModelLoadError(f"the checkpoint lacks the tensor {name!r}", got=directory, hint=hint)


def _check_tensor(expected: _Expected, stored: Stored, file: safe_open) -> None:
    tensor, source = open_tensor(file, stored), expected.source
    if _without_ones(tensor.get_shape()) != _without_ones(source.shape):
        raise ModelLoadError(f"{_at(stored)} has the wrong shape", got=tensor.get_shape(), expected=list(source.shape),
                             hint="config.json does not belong to these weights")
    dtypes = list(_FLOATS.values()) if expected.dtype in _FLOATS else [_OTHERS[expected.dtype]]
    if tensor.get_dtype() not in dtypes:
        raise ModelLoadError(f"{_at(stored)} has an unsupported dtype", got=tensor.get_dtype(),
                             expected=", ".join(dtypes), hint="where the checkpoint's weights have fewer bits, its "
                             "config.json has a quantization_config that says so")


def _without_ones(shape: Sequence[int]) -> list[int]:
    """Tools differ in whether a scale is stored as [], [1] or, for outputs, as [out] or [out, 1]."""
    return [size for size in shape if size != 1]


def _refuse_other_head(embeddings: Stored, head: Stored | None) -> None:
    if head is not None and head != embeddings and not equal(embeddings, head):
        raise ModelLoadError("the checkpoint has a head that differs from its embeddings, but the model's "
                             "configuration ties them", got=_at(head),
                             hint="take the configuration from read_config, which looks at the stored tensors")


def _at(stored: Stored) -> str:
    return f"the tensor {stored.name!r} in {stored.path.name}"


def _fill(into: torch.Tensor, spec: ParameterSpec, source: StoredSlice, at: int, stored: Stored, file: safe_open,
          topology: Topology) -> None:
    first, last = source.local(topology.axis(spec.mesh_axis))
    tensor = open_tensor(file, stored)
    try:
        index, whole = source.index(first, last), tuple(tensor.get_shape()) != source.shape
        value = source.picked(tensor[()].reshape(source.shape)[index] if whole else tensor[index])
    except SafetensorError as error:
        raise ModelLoadError(f"{_at(stored)} cannot be read", got=f"{stored.path}: {error}") from None
    if value.is_floating_point() and (value.ndim == 1 or not source.name.endswith("weight")):
        value = _finite(value.to(into.dtype), stored)
    if spec.added:
        value = value.to(into.dtype) + spec.added
    if spec.below is not None:
        _check_range(value, spec.below, stored)
    end = at + last - first
    if not into.ndim:
        into.copy_(value)
        return
    filled = into.narrow(spec.filled, at, last - first)
    filled.copy_(value.view(filled.shape) if value.ndim != filled.ndim else value)  # a stored tensor lacks "part"
    if source is spec.sources[-1] and end < into.shape[spec.filled]:
        into.narrow(spec.filled, end, into.shape[spec.filled] - end).zero_()


def _check_range(value: torch.Tensor, below: int, stored: Stored) -> None:
    if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < below:
        raise ModelLoadError(f"{_at(stored)} has a value out of range", got=f"{int(value.min())} to {int(value.max())}",
                             expected=f"from 0 to {below - 1}", hint="the checkpoint is damaged")


def _finite(vector: torch.Tensor, stored: Stored) -> torch.Tensor:
    """Only norms, biases and scales are checked, at no cost. A matrix would need a second pass over memory."""
    finite = vector.isfinite().flatten()
    if not finite.all():
        at = int(finite.logical_not().nonzero()[0])
        dtype = str(vector.dtype).removeprefix("torch.")
        raise ModelLoadError(f"{_at(stored)} has values that are not finite in {dtype}",
                             got=f"{vector.flatten()[at].item()} at {at}, {int(finite.logical_not().sum())} of "
                                 f"{len(finite)}",
                             hint="the checkpoint is damaged" if dtype != "float16" else
                                  "the checkpoint is damaged, or its values need dtype bfloat16 or float32")
    return vector
