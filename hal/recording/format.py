"""A recording: one safetensors file, whose metadata is JSON. Nothing in it is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hal import files
from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, EngineConfig, Topology, WorkerConfig
from hal.contracts import backend as backends
from hal.contracts.backend import Backend
from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest
from hal.errors import CapacityError, ConfigError, InputError, WireError
from hal.features import COLUMNS
from hal.model_config import ModelConfig
from hal.recording.check import inputs_of
from hal.recording.reading import FORMAT, HONOURED, LIMITS, SHAPE, check_limits, info_of, object_of, read
from hal.recording.renumber import renumbered, used_blocks
from hal.recording.typed import typed
from hal.schema import Declared
from hal.schema.packed import as_tensor

_BUNDLED = "(bundled)"
_HINT = "replay it with the version that made it"
_TOKENS = SamplerOutput  # of a recording that names no other type of output
D = TypeVar("D", bound=Declared)


@dataclass(slots=True)
class RecordedStep:
    """Attributes:
        input: what the request means on the device; None where the runner's input is not a paged one, since then the
            runner alone can prepare it.
        output: None where the step failed, or only rebuilds.
        stored: the scalars and the arrays of an output that `Recording.restore_outputs` has not made yet.
    """

    request: ExecuteModelRequest
    input: PagedModelInput | None = None
    output: Declared | None = None
    stored: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None


@dataclass(slots=True)
class Recording:
    """Steps that begin with an empty cache. So running all of them rebuilds the cache, in the layout of any device.

    Attributes:
        engine: the engine's options. A loaded recording has only those that its steps depend on (HONOURED), within
            limits. All others are the defaults, since a file must not start processes, import modules or choose what is
            read.
        info: where the recording was made: device, versions, schema fingerprints, and "error" if the last step failed.
        ignored: the options of the file that are not in `engine`.
        output_name: of the class that declares the outputs. A file cannot choose which class that is, so outputs of
            another than SamplerOutput are made when the runner is known: `restore_outputs`.
    """

    engine: EngineConfig
    model: ModelConfig
    info: dict[str, Any]
    steps: list[RecordedStep] = field(default_factory=list)
    ignored: dict[str, Any] = field(default_factory=dict)
    output_name: str = _TOKENS.__name__

    @property
    def paged(self) -> bool:
        """The steps have paged inputs, as those of a runner with a KV cache have."""
        return all(step.input is not None for step in self.steps)

    def config(self, backend: Backend, *, device: str, model: str | None = None,
               adapters: Mapping[str, str] | None = None, **options: Any) -> WorkerConfig:
        """The configuration of a run on one rank. A dtype of weights or KV cache that the backend lacks is replaced.

        Args:
            device: the name of the backend.
            model: the checkpoint's directory. Without it, only the bundled model is read.
            adapters: the directory of each adapter that the steps name.
            options: engine options that replace recorded ones. random_weights takes the model's shape from the file.

        Raises:
            ConfigError: the recording needs a checkpoint or an adapter and none is given, or another model is given,
                or the recording was made with random weights and `options` do not ask for them.
            ModelLoadError: the checkpoint cannot be read.
            CapacityError: random weights of the recorded shape do not fit. WireError: the steps do not fit `options`.
        """
        can, dtype = backend.capabilities, self.engine.dtype
        engine = replace(self.engine, **{
            "device": device, "dtype": dtype if dtype in can.dtypes else backends.resolve_dtype(backend, "auto", dtype),
            **({} if can.fp8_kv else {"kv_dtype": "auto"}), "tp": 1, "pp": 1, **options})
        if engine.random_weights:
            found = self.model
            size = found.num_params * (4 if engine.dtype == "float32" else 2)
            free = backend.free_memory(backend.device(0))
            if size > free:
                raise CapacityError("memory cannot hold the recorded model's weights", got=f"{free:,} bytes free",
                                    expected=f"{size:,} bytes", hint="use a device with more memory")
        else:
            engine = replace(engine, model=self._checkpoint(model))
            found = read_config(engine.model, impl=engine.model_impl, pooling=engine.pooling,
                                    trust_remote_code=engine.trust_remote_code, quantize=engine.quantize)
            for name in SHAPE:
                if getattr(found, name) != getattr(self.model, name):
                    raise ConfigError("the recording is of another model than the checkpoint",
                                      got=f"{name}={getattr(found, name)} in {engine.model}",
                                      expected=getattr(self.model, name), hint="give its own checkpoint: --model DIR")
        if any(getattr(engine, name) != getattr(self.engine, name) for name in LIMITS):
            inputs_of([step.request for step in self.steps], engine, found, paged=self.paged)
        self._find_adapters(adapters or {})
        return WorkerConfig(engine, found, Topology())

    def _find_adapters(self, given: Mapping[str, str]) -> None:
        for request in (step.request for step in self.steps):
            missing = [name for name in request["adapter_names"] if name not in given]
            if missing:
                raise ConfigError("the recording uses an adapter, and a file does not choose what is read",
                                  got=f"no directory of {missing[0]!r}", expected="the directory of each adapter",
                                  hint=f"say where it lies: --adapter {missing[0]}=DIR")
            setattr(request, "adapter_paths", tuple(given[name] for name in request["adapter_names"]))

    def _checkpoint(self, given: str | None) -> str:
        if self.ignored.get("random_weights") and given is None:
            raise ConfigError("the recording was made with random weights", expected="to be asked for them",
                              hint="--random-weights initialises the shape that the file gives; --model DIR takes the "
                                   "weights of a checkpoint")
        recorded = self.ignored.get("model", _BUNDLED)
        if given is None and recorded != _BUNDLED:
            raise ConfigError("the recording is of a checkpoint, and a file does not choose what is read",
                              got=f"recorded with {recorded!r}", hint="say where the checkpoint lies: --model DIR")
        return given or str(BUNDLED_MODEL)

    def save(self, path: Path) -> None:
        """Write the whole file. After an error an older file is unchanged. Raises ConfigError."""
        tensors: dict[str, torch.Tensor] = {}
        scalars: list[dict[str, Any]] = []
        for i, step in enumerate(self.steps):
            parts = {"request": step.request, "input": step.input, "output": step.output}
            scalars.append({name: _take(f"{i:05}.{name}", part, tensors) for name, part in parts.items()
                            if part is not None})
        kinds = {type(part): None for step in self.steps for part in (step.request, step.input, step.output)
                 if part is not None}
        engine = {**asdict(self.engine), **self.ignored}
        engine["model"] = _BUNDLED if Path(engine["model"]) == BUNDLED_MODEL else engine["model"]
        head = {"format": FORMAT, "engine": engine, "model": asdict(self.model), "info": self.info, "steps": scalars,
                "schemas": _fingerprints(*kinds), "columns": _columns(), "output": self.output_name}
        try:
            with files.replacing(path) as temporary:
                save_file(tensors, str(temporary), {"hal": json.dumps(head)})
        except (OSError, SafetensorError) as error:
            raise ConfigError("the recording cannot be written", got=f"{path}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read and check a recording, which is not trusted. The file's size and _TOKENS bound the memory that this
        takes.

        Raises:
            ConfigError: the file cannot be read, or its engine options are invalid. WireError: it is not a recording,
                or it has other schemas than this library, or steps that cannot be run.
        """
        head, tensors = read(path)
        options = {"model": _BUNDLED, **object_of(head, "engine")}
        named = options.pop("model")  # the path is not even expanded
        if not isinstance(named, str):
            raise WireError("the recording's engine.model is not usable", got=repr(named)[:100], expected="str")
        engine = typed(EngineConfig, options, "engine")
        model = typed(ModelConfig, head.get("model"), "model")
        check_limits(engine, model)
        steps = _steps(head, tensors)
        requests, paged = [step.request for step in steps], all(step.input is not None for step in steps)
        inputs = inputs_of(requests, engine, model, paged=paged)
        for i, (step, made) in enumerate(zip(steps, inputs, strict=True)):
            _check_input(i, step, made)
        context = -(-(engine.longest_sequence(model)) // engine.block_size)
        blocks, host = used_blocks(requests, device=True), used_blocks(requests, device=False)
        if blocks.max(initial=0) > max(len(blocks), context) or host.max(initial=-1) >= len(host):
            # The recording device may have had many more blocks, so the recorded ids may lie far apart.
            requests, blocks = renumbered(requests, blocks, host), np.arange(1, len(blocks) + 1)
            inputs = inputs_of(requests, replace(engine, num_blocks=None), model, paged=paged)
        steps = [RecordedStep(r, m, None, s.stored) for r, m, s in zip(requests, inputs, steps, strict=True)]
        own: dict[str, Any] = {"num_blocks": 1 + max(context, int(blocks.max(initial=0))), "num_cpu_blocks": len(host),
               "async_scheduling": False, "speculate": None, "draft_model": None}
        drafts = max((int(r.draft_counts.max(initial=0)) for r in requests if r.draft_counts is not None), default=0)
        own["steps_per_message"] = max((r.num_steps for r in requests), default=1)
        if drafts:  # the requests have them, so their runner needs no proposer of the file's choice
            own |= {"speculate": "ngram", "speculative_tokens": drafts}
        ignored = {name: value for name, value in asdict(engine).items() if name not in (*HONOURED, *own)}
        ignored["model"] = named
        kept = {name: getattr(engine, name) for name in HONOURED}
        name = head.get("output", _TOKENS.__name__)
        recording = cls(EngineConfig(**kept, **own), model, info_of(head), steps, ignored, str(name)[:200])
        if recording.output_name == _TOKENS.__name__:
            recording.restore_outputs(_TOKENS)
        return recording

    def restore_outputs(self, kind: type[Declared]) -> None:
        """Make the outputs of a loaded recording. Those that are there already stay.

        Args:
            kind: what the runner that replays the steps yields.

        Raises:
            WireError: the recording has outputs of another class, or they are not legal, or not what the step samples.
        """
        if kind.__name__ != self.output_name:
            raise WireError("the recording has outputs of another class than the runner yields", got=self.output_name,
                            expected=kind.__name__, hint="replay it on a runner like the one that made it")
        for i, step in enumerate(self.steps):
            if step.stored is not None:
                step.output, step.stored = _output(i, kind, *step.stored), None
                _check_tokens(i, step, self.model.vocab_size)


def _steps(head: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[RecordedStep]:
    found, kinds = list[RecordedStep](), (ExecuteModelRequest, PagedModelInput)
    schemas = repr(head.get("schemas"))[:300]
    steps = head.get("steps")
    if head.get("columns") != _columns():
        raise WireError("the recording has other columns of sampling parameters than this library",
                        got=repr(head.get("columns"))[:300], expected=_columns(),
                        hint=f"{_HINT}, and with the same step features (HAL_FEATURES)")
    if not isinstance(steps, list):
        raise WireError("the recording has no steps", got=repr(steps)[:100], expected="a list")
    try:
        for i, scalars in enumerate(steps):
            start = f"{i:05}."
            request = object_of(scalars, "request")
            step = RecordedStep(_restore(ExecuteModelRequest, start + "request.", request, tensors))
            # A file does not choose what is read.
            setattr(step.request, "adapter_paths", ("",) * len(step.request["adapter_names"]))
            if "input" in scalars:
                step.input = _restore(PagedModelInput, start + "input.", object_of(scalars, "input"), tensors)
            if "output" in scalars:
                start += "output."
                names = [name for name in tensors if name.startswith(start)]
                step.stored = object_of(scalars, "output"), {name[len(start):]: tensors.pop(name) for name in names}
            found.append(step)
    except (TypeError, InputError) as error:
        raise WireError(f"the recording does not fit this library's schemas: {error}", got=schemas,
                        expected=_fingerprints(*kinds), hint=_HINT) from None
    if tensors:
        raise WireError("the recording has fields that this library's schemas lack", got=", ".join(tensors)[:200],
                        expected=_fingerprints(*kinds), hint=_HINT)
    return found


def _output(i: int, kind: type[D], scalars: dict[str, Any], arrays: dict[str, torch.Tensor]) -> D:
    try:
        made = _restore(kind, "", scalars, arrays)
        made.check()
    except (TypeError, InputError) as error:
        raise WireError(f"step {i} of the recording has no legal output: {error}", hint=_HINT) from None
    if arrays:
        raise WireError(f"step {i} of the recording has an output with fields that {kind.__name__} lacks",
                        got=", ".join(arrays)[:200], hint=_HINT)
    return made


def _check_input(i: int, step: RecordedStep, made: PagedModelInput | None) -> None:
    """The arrays recorded beside the request are what it means."""
    if made is None or step.input is None:
        return
    for f in PagedModelInput.schema.fields:
        ours, theirs = made[f.name], step.input[f.name]
        if f.array is not None and ours is not None and theirs is not None and not ours.equal(theirs):
            raise WireError(f"step {i} of the recording has an input that is not what its request means", got=f.name,
                            hint=_HINT)


def _check_tokens(i: int, step: RecordedStep, vocab_size: int) -> None:
    """Where the output is tokens, there are as many as the step samples."""
    if step.input is None or not isinstance(step.output, _TOKENS):
        return
    rows, tokens, counts = step.output.num_rows, step.output.token_ids, step.input.sample_counts
    expected = step.input.num_samples if counts is None else len(counts)
    if rows != expected or (len(tokens) and int(tokens.max()) >= vocab_size):
        raise WireError(f"step {i} of the recording has other tokens than it samples", got=str(tokens.tolist())[:200],
                        expected=f"those of {expected} rows, ids below {vocab_size}")


def _fingerprints(*kinds: type[Declared]) -> dict[str, str]:
    """The fingerprints of the schemas. A library with other schemas can read a recording if it has all its fields."""
    return {kind.__name__: f"{kind.schema.fingerprint:016x}" for kind in kinds}


def _columns() -> dict[str, list[str]]:
    """The names of the columns of new_floats and new_ints."""
    return {kind: [column.name for column in columns] for kind, columns in COLUMNS.items()}


def _take(prefix: str, value: Declared, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Copy the arrays into `tensors`. Returns the scalars."""
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
        found = tensors.pop(prefix + f.name, None)
        if f.array and found is not None:
            arrays[f.name] = found if f.kind == "tensor" else found.numpy()
    scalars = {n: tuple(value) if type(value) is list else value for n, value in scalars.items()}  # JSON has lists
    made: D = kind(**arrays, **scalars)
    made.validate()
    return made
