"""A checkpoint directory's files, or a GGUF file, and the place of each stored tensor. Importing this loads no torch.

A directory may come from anywhere, so nothing in it is trusted. The size of a JSON file is limited, a shard must lie
inside the directory, and every fault is a ModelLoadError that names the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from os.path import isdir, isfile  # pathlib's methods raise for some names
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from safetensors import SafetensorError, safe_open

from hal.errors import ModelLoadError
from hal.weights.base import canonical

if TYPE_CHECKING:
    import torch

HEAD = "lm_head.weight"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_JSON = 64 << 20  # bytes; the index of the largest published checkpoints takes about 10 MiB
_ROWS = 4096  # rows compared at a time


@dataclass(frozen=True, slots=True)
class Stored:
    """Attributes:
        name: the tensor's name in its file. path: the safetensors file.
    """

    name: str
    path: Path


class LazyTensor(Protocol):
    """A tensor of an open safetensors file. Indexing reads the indexed part."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor: ...


def locate(directory: Path) -> dict[str, Stored]:
    """Where each tensor is stored, by its name without the prefix "model." or "transformer.". `directory` may be a GGUF
    file.

    The file is model.safetensors. Without that file, the weight_map of model.safetensors.index.json names the shard of
    each tensor, and a tensor in another shard than the named one is not part of the checkpoint. Shards are not opened.

    Raises:
        ModelLoadError: there are no weights; the index is damaged, or names a shard that is missing or lies outside the
            directory; a name occurs twice.
    """
    if directory.suffix == ".gguf":
        from hal.checkpoints import gguf

        return gguf.locate(directory)
    tensors: dict[str, Stored] = {}
    for stored in _single(directory / _SINGLE) if isfile(directory / _SINGLE) else _indexed(directory):
        name = canonical(stored.name)
        if name in tensors:
            first = tensors[name]
            raise ModelLoadError(f"the checkpoint has the tensor {shown(name)} twice",
                                 got=f"{shown(first.name)} in {first.path.name}, "
                                     f"{shown(stored.name)} in {stored.path.name}")
        tensors[name] = stored
    return tensors


def has_weights(directory: Path) -> bool:
    return directory.suffix == ".gguf" or isfile(directory / _SINGLE) or isfile(directory / _INDEX)


def _single(path: Path) -> list[Stored]:
    with open_file(path, "np") as file:
        names: list[str] = file.keys()
    return [Stored(name, path) for name in names]


def _indexed(directory: Path) -> list[Stored]:
    index = directory / _INDEX
    if not isfile(index):
        others = sorted(p.name for end in ("bin", "safetensors") for p in directory.glob(f"*.{end}")) if isdir(
            directory) else []
        pickled = any(name.endswith(".bin") for name in others)
        raise ModelLoadError("the model directory has no weights", got=f"{directory}" + (
                             f" with {', '.join(others[:8])}" if others else ""), expected=f"{_SINGLE} or {_INDEX}",
                             hint="load it with transformers and save it again: save_pretrained writes safetensors"
                             if pickled else "download the checkpoint again, whole")
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict):
        raise ModelLoadError(f"{_INDEX} has no usable weight_map", got=f"{index}: {shown(mapped)}",
                             expected="a JSON object of tensor names and file names")
    found: list[Stored] = []
    shards: dict[str, Path] = {}
    for name, shard in mapped.items():
        if not isinstance(shard, str) or shard not in shards:
            shards[shard] = _shard(directory, shard)
        found.append(Stored(name, shards[shard]))
    return found


def _shard(directory: Path, name: object) -> Path:
    """Check a shard's name. Links are followed, since download caches keep each shard as a link to another folder."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not isinstance(name, str) or not parts or parts[0].startswith("/") or ".." in parts:
        raise ModelLoadError(f"{_INDEX} names a shard that is not a file of the checkpoint", got=shown(name),
                             expected="a file name inside the model directory")
    if not isfile(directory / name):
        raise ModelLoadError(f"the checkpoint file {shown(name)}, which {_INDEX} names, is missing", got=directory,
                             hint="download the checkpoint again")
    return directory / name


def open_file(path: Path, framework: Literal["np", "pt"]) -> safe_open:
    """Open a safetensors file. With "np" torch is not loaded; then only names, shapes and dtypes may be read.

    Raises:
        ModelLoadError: the file is missing, truncated or no safetensors file.
    """
    if path.suffix == ".gguf":
        from hal.checkpoints.gguf import open_gguf

        return cast(safe_open, open_gguf(path))
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError:
        raise ModelLoadError(f"the checkpoint file {path.name} is missing", got=path,
                             hint="download the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"the checkpoint file {path.name} is damaged", got=f"{path}: {error}",
                             expected="a complete safetensors file", hint="download it again") from None


def open_tensor(file: safe_open, stored: Stored) -> LazyTensor:
    """The tensor in its open file, not read yet.

    Raises:
        ModelLoadError: the file does not have it.
    """
    try:
        tensor: LazyTensor = file.get_slice(stored.name)  # type: ignore[no-untyped-call]
        return tensor
    except SafetensorError as error:
        raise ModelLoadError(f"the checkpoint file {stored.path.name} lacks the tensor {shown(stored.name)}",
                             got=f"{stored.path}: {error}", expected=f"every tensor that {_INDEX} maps to this file",
                             hint="download the checkpoint again") from None


def stored_dtype(stored: Stored) -> str:
    """As safetensors spells it: "F32", "BF16" and so on. Raises as open_file and open_tensor do."""
    with open_file(stored.path, "np") as file:
        return open_tensor(file, stored).get_dtype()


def equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors have the same dtype, shape and values. Loads torch; stops at the first rows that differ.
    Raises as open_file and open_tensor do."""
    import torch

    with open_file(a.path, "pt") as file_a, open_file(b.path, "pt") as file_b:
        x, y = open_tensor(file_a, a), open_tensor(file_b, b)
        shape = x.get_shape()
        if shape != y.get_shape() or x.get_dtype() != y.get_dtype() or not shape:
            return False
        return all(torch.equal(x[i:i + _ROWS], y[i:i + _ROWS]) for i in range(0, shape[0], _ROWS))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        ModelLoadError: the file is absent, is larger than 64 MiB, is not JSON, nests too deeply, or holds no object.
    """
    try:
        # Opening a named pipe in place of the file would block for ever.
        if not isfile(path):
            raise ModelLoadError(f"the model directory has no {path.name}", got=path.parent,
                                 expected="a checkpoint in Hugging Face format",
                                 hint="give the folder that has this file, or download the checkpoint again")
        if path.stat().st_size > _MAX_JSON:
            raise ModelLoadError(f"{path.name} is too large", got=f"{path.stat().st_size} bytes",
                                 expected=f"at most {_MAX_JSON} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path.name} cannot be read", got=f"{path}: {error}", expected="a JSON object") from None
    except RecursionError:
        raise ModelLoadError(f"{path.name} nests too deeply", got=path, expected="a JSON object") from None
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path.name} is not a JSON object", got=type(data).__name__)
    return data


def shown(value: object) -> str:
    """The repr of an untrusted value for an error text, cut to a readable length and depth."""
    short = Repr()
    short.maxlevel, short.maxlist, short.maxdict = 3, 8, 8
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        return short.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "an integer of thousands of digits"
