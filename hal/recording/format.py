"""A recording: one safetensors file, whose metadata is JSON. Nothing in it is pickled."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hal import backend as backends
from hal import files
from hal.backend import Backend
from hal.config import BUNDLED_MODEL, EngineConfig, Topology, WorkerConfig
from hal.errors import ConfigError, InputError, WireError
from hal.inputs import PagedModelInput
from hal.models.config import ModelConfig
from hal.outputs import SamplerOutput
from hal.request import ExecuteModelRequest
from hal.schema import Declared
from hal.schema.packed import as_tensor

FORMAT = 1
_BUNDLED = "(bundled)"
_KINDS: tuple[type[Declared], ...] = (ExecuteModelRequest, PagedModelInput, SamplerOutput)
D = TypeVar("D", bound=Declared)


@dataclass(slots=True)
class RecordedStep:
    """Attributes: input: what the request means on the device. output: None where the step failed, or only rebuilds."""

    request: ExecuteModelRequest
    input: PagedModelInput
    output: SamplerOutput | None = None


@dataclass(slots=True)
class Recording:
    """Steps from an empty cache on, so that running them all rebuilds it, on a device with any layout of its own.

    Attributes:
        info: where it was made: device, versions, schema fingerprints, and "error", when the last step failed.
    """

    engine: EngineConfig
    model: ModelConfig
    info: dict[str, Any]
    steps: list[RecordedStep] = field(default_factory=list)

    def config(self, backend: Backend, **options: Any) -> WorkerConfig:
        """Of a run on one rank, with some of the engine's options replaced; so are a dtype, and that of the KV cache,
        which the backend does not have, unless they are given."""
        can, dtype = backend.capabilities, self.engine.dtype
        options = {"dtype": dtype if dtype in can.dtypes else backends.resolve_dtype(backend, "auto", dtype),
                   **({} if can.fp8_kv else {"kv_dtype": "auto"}), **options}
        return WorkerConfig(EngineConfig(**{**asdict(self.engine), "tp": 1, "pp": 1, **options}), self.model,
                            Topology())

    def save(self, path: Path) -> None:
        """Write the file as a whole; after an error an older one is as it was. Raises ConfigError."""
        tensors: dict[str, torch.Tensor] = {}
        scalars: list[dict[str, Any]] = []
        for i, step in enumerate(self.steps):
            parts = {"request": step.request, "input": step.input, "output": step.output}
            scalars.append({name: _take(f"{i:05}.{name}", part, tensors) for name, part in parts.items()
                            if part is not None})
        engine = asdict(self.engine)
        engine["model"] = _BUNDLED if Path(engine["model"]) == BUNDLED_MODEL else engine["model"]
        head = {"format": FORMAT, "engine": engine, "model": asdict(self.model), "info": self.info, "steps": scalars,
                "schemas": _fingerprints()}
        try:
            with files.replacing(path) as temporary:
                save_file(tensors, str(temporary), {"hal": json.dumps(head)})
        except (OSError, SafetensorError) as error:
            raise ConfigError("the recording cannot be written", got=f"{path}: {error}") from error

    @classmethod
    def load(cls, path: Path, model: str | None = None) -> Recording:
        """Args:
            model: the checkpoint's directory, where it is not the one that the recording names.

        Raises:
            ConfigError: it cannot be read. WireError: it is not a recording, or of other schemas than this library's.
        """
        try:
            with safe_open(path, framework="pt") as file:
                head = json.loads((file.metadata() or {})["hal"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError("the recording cannot be read", got=f"{path}: {error}") from None
        except (KeyError, ValueError):
            raise WireError("this safetensors file is not a recording", got=path) from None
        engine = head["engine"]
        engine["model"] = model or (str(BUNDLED_MODEL) if engine["model"] == _BUNDLED else engine["model"])
        try:
            steps = [RecordedStep(
                _restore(ExecuteModelRequest, f"{i:05}.request", scalars["request"], tensors),
                _restore(PagedModelInput, f"{i:05}.input", scalars["input"], tensors),
                _restore(SamplerOutput, f"{i:05}.output", scalars["output"], tensors) if "output" in scalars else None)
                for i, scalars in enumerate(head["steps"])]
        except (KeyError, TypeError, InputError) as error:
            raise WireError(f"the recording does not fit this library's schemas: {error}", got=head["schemas"],
                            expected=_fingerprints(), hint="replay it with the version that made it") from None
        if tensors:
            raise WireError("the recording has fields that this library's schemas lack", got=", ".join(tensors)[:200],
                            expected=_fingerprints(), hint="replay it with the version that made it")
        config = ModelConfig.from_dict(head["model"])
        context = -(-(engine["max_model_len"] or config.max_position) // engine["block_size"])
        # The device that made it may have had room for many more.
        engine["num_blocks"] = 1 + max([context, *(_highest_block(step.request) for step in steps)])
        return cls(EngineConfig(**engine), config, head["info"], steps)


def _highest_block(request: ExecuteModelRequest) -> int:
    found = [request.new_blocks]
    for pairs, columns in ((request.blocks_to_copy, slice(0, 2)), (request.blocks_to_swap_in, slice(1, 2)),
                           (request.blocks_to_swap_out, slice(0, 1))):
        if pairs is not None:
            found.append(pairs[:, columns].ravel())
    return max(int(blocks.max(initial=0)) for blocks in found)


def _fingerprints() -> dict[str, str]:
    """They say whether the schemas are the same; others that have all that is recorded read it too."""
    return {kind.__name__: f"{kind.schema.fingerprint:016x}" for kind in _KINDS}


def _take(prefix: str, value: Declared, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put the arrays into `tensors`, copied; the scalars."""
    scalars = {}
    for f in type(value).schema.fields:
        found = value[f.name]
        if f.array is None:
            scalars[f.name] = found
        elif found is not None:
            tensor = found if f.kind == "tensor" else as_tensor(found, f.array.dtype)
            tensors[f"{prefix}.{f.name}"] = tensor.detach().cpu().clone()
    return scalars


def _restore(kind: type[D], prefix: str, scalars: dict[str, Any], tensors: dict[str, torch.Tensor]) -> D:
    arrays: dict[str, Any] = {}
    for f in kind.schema.fields:
        found = tensors.pop(f"{prefix}.{f.name}", None)
        if f.array and found is not None:
            arrays[f.name] = found if f.kind == "tensor" else found.numpy()
    made: D = kind(**arrays, **scalars)
    made.validate()
    return made
