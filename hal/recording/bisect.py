"""Bisection of two devices: the first layer and operation whose results differ when both get the same arguments. A
runner that is not composed of operations tells values instead (ModelRunnerBase.execute_traced), and these are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hal.contracts import backend as backends
from hal.contracts.backend import Backend
from hal.contracts.block_moves import load_adapters, move_blocks, move_rows, on_host
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.inputs import NULL_BLOCK
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import ModelRunnerBase
from hal.errors import BackendError, CapacityError
from hal.models.layers import Linear
from hal.models.ops import Ops
from hal.paged.steps import take_steps
from hal.recording.format import Recording
from hal.testing.tolerance import Tolerances

# Operations by name: how many leading arguments are activations, and the row of the tolerance table.
_TRACED = {"linear": (1, "linear"), "adapt": (2, "linear"), "rms_norm": (1, "norm"), "add_rms_norm": (2, "norm"),
           "layer_norm": (1, "norm"), "rotary": (1, "rotary"), "silu_mul": (1, "activation"),
           "activation": (1, "activation"), "experts": (3, "experts"), "attention": (3, "attention")}
_PARTS = "ops", "make_attention", "forward_context", "sample"


@dataclass(frozen=True, slots=True)
class Call:
    """One operation of a step. Attributes: layer: None outside the layers. name: of the weight, or "". Tensors are on
    the host."""

    layer: int | None
    op: str
    name: str
    arguments: list[torch.Tensor]
    results: list[torch.Tensor]

    def __str__(self) -> str:
        where = "outside the layers" if self.layer is None else f"layer {self.layer}"
        return f"{where}, {self.op}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True, slots=True)
class Divergence:
    """Attributes:
        between: the call's arguments differed already, so the fault lies between the call before and this one.
        error: the largest |difference| / (1 + largest |value|). got, expected: the two values at that place.
    """

    step: int
    call: Call
    between: bool
    error: float
    tolerance: float
    got: float
    expected: float


@dataclass(slots=True)
class Bisection:
    """Attributes:
        calls: the number of operations compared.
        flip: (step, row, token of `against`, token of `device`) of the first token that differs when `device` runs by
            itself and each step gets the recorded tokens.
        known, told: names of the values that execute_traced may tell of this model, and that it has told.
    """

    device: str
    against: str
    calls: int = 0
    divergence: Divergence | None = None
    flip: tuple[int, int, int, int] | None = None
    known: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        d = self.divergence
        if d is None:
            text = f"no operation of {self.device} is off from {self.against} beyond the tolerance: " \
                   f"{self.calls} compared"
        else:
            text = f"{self.device} parts from {self.against} in step {d.step}: {'before ' * d.between}{d.call}\n" \
                   f"  error {d.error:.3g}, tolerance {d.tolerance:g}; got {d.got:.6g}, expected {d.expected:.6g}"
        for what, names in (("never told", self.known - self.told), ("unknown here", self.told - self.known)):
            text += f"\n  names of execute_traced, {what}: {', '.join(sorted(names))}" if names else ""
        if self.flip is None:
            return text + "\n  no token is another"
        step, row, old, new = self.flip
        return text + f"\n  the first other token: step {step}, row {row}: {old} -> {new}"


@dataclass(slots=True)
class _Trace:
    """A trace that notes a step's operations, or follows the operations that another trace has noted: it computes each
    one from the noted arguments, compares the results, and goes on with the noted results."""

    tolerances: Callable[[str], float]
    calls: list[Call] = field(default_factory=list)
    follow: list[Call] | None = None
    found: tuple[Call, bool, float, float, float, float] | None = None
    layer: int | None = None
    names: dict[int, str] = field(default_factory=dict)

    def run(self, op: str, function: Callable[..., Any], *args: Any) -> Any:
        count, kind = _TRACED[op]
        given = list(args[:count])
        name = self.names.get(id(args[count]), "") if len(args) > count else ""
        at, other = len(self.calls), None
        if self.follow is not None and self.found is None:
            other = self.follow[at] if at < len(self.follow) else None
            if other is None or (other.op, other.layer) != (op, self.layer):
                self.found = Call(self.layer, op, name, [], []), True, torch.inf, 0.0, torch.nan, torch.nan
                other = None
        if other is not None:
            self._compare(other, given, other.arguments, kind, True)
            given = [a.to(g.device, g.dtype) for g, a in zip(given, other.arguments, strict=True)]
        kept = [x.cpu().clone() for x in given]  # copies, since models and operations change their arguments in place
        result = function(*given, *args[count:])
        results = list(result) if isinstance(result, tuple) else [result]
        if other is not None:
            self._compare(other, results, other.results, kind, False)
            results = [a.to(r.device, r.dtype) for r, a in zip(results, other.results, strict=True)]
        self.calls.append(Call(self.layer, op, name, kept, [x.cpu().clone() for x in results]))
        return tuple(results) if isinstance(result, tuple) else results[0]

    def _compare(self, call: Call, got: list[torch.Tensor], expected: list[torch.Tensor], kind: str, before: bool,
                 ) -> None:
        tolerance = self.tolerances(kind)
        for a, b in zip(got, expected, strict=True):
            if self.found is not None or not b.numel():
                return
            error, x, y = _apart(a, b)
            if error > tolerance:
                self.found = call, before, error, tolerance, x, y


def _apart(got: torch.Tensor, expected: torch.Tensor) -> tuple[float, float, float]:
    """Divergence's error, got and expected."""
    x, y = got.cpu().double().reshape(-1), expected.double().reshape(-1)
    off = (x - y).abs().nan_to_num(nan=torch.inf)
    worst = int(off.argmax())
    return float(off[worst] / (1 + y.abs().max())), float(x[worst]), float(y[worst])


def _told(calls: list[Call]) -> dict[tuple[int | None, str], tuple[Call, torch.Tensor]]:
    """The values among a step's operations that execute_traced names too, by layer and name."""
    return {(c.layer, c.name.removeprefix(f"layers.{c.layer}.") if c.op == "linear" else c.op): (c, c.results[0])
            for c in calls if c.op in ("linear", "attention")}


class _Traced:
    """A stand-in for an operations table or an attention."""

    def __init__(self, inner: Any, trace: _Trace) -> None:
        self._inner, self._trace = inner, trace

    # Their results are inside the operations that they stand for.
    apply_norm: Any = Ops.apply_norm
    gated: Any = Ops.gated
    mixture: Any = Ops.mixture
    norm_linear: Any = Ops.norm_linear
    norm_heads: Any = Ops.norm_heads
    rotary_attention: Any = Ops.rotary_attention

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._trace.run, name, found) if name in _TRACED else found

    def begin(self, model_input: Any, kv_caches: Any) -> Callable[..., torch.Tensor]:
        step = self._inner.begin(model_input, kv_caches)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self._trace.run("attention", partial(step, layer), q, k, v)
            return result

        return attend


class _Device:
    """A runner on one device, with or without a trace."""

    def __init__(self, recording: Recording, backend: Backend, device: str, trace: _Trace | None, **options: Any,
                 ) -> None:
        config = recording.config(backend, device=device, **options)
        self.device, self.trace, self.dtype = backend.device(0), trace, config.engine.dtype
        runner: Any = backend.make_runner(config, self.device, LocalCommunicator())
        self.runner = runner
        lacking = [part for part in _PARTS if not hasattr(self.runner, part)]
        self.composed = not lacking
        if trace is not None and lacking and type(runner).execute_traced is ModelRunnerBase.execute_traced:
            raise BackendError(f"{backend.name!r} cannot be bisected", got=f"{type(self.runner).__name__} without "
                               f"{', '.join(lacking)}", expected="a runner composed as PagedModelRunner is, or one "
                               "with execute_traced")
        if trace is not None and self.composed:
            runner.ops = _Traced(runner.ops, trace)
        runner.load_model()
        size = runner.kv_bytes_per_block() * ((config.engine.num_blocks or 1) + config.engine.num_cpu_blocks)
        free = backend.free_memory(self.device)
        if size + runner.reserve_bytes() > free:
            raise CapacityError("memory cannot hold the recording's KV cache", got=f"{free:,} bytes free",
                                expected=f"{size:,} bytes, and {runner.reserve_bytes():,} for a step",
                                hint="bisect on a machine with more memory, or record with a smaller max_model_len")
        self.num_blocks = config.engine.num_blocks or 1
        self.caches = runner.make_kv_caches(self.num_blocks)
        block = runner.read_blocks(self.caches, torch.tensor([NULL_BLOCK])) if config.engine.num_cpu_blocks else ()
        self.host = on_host(block, config.engine.num_cpu_blocks)
        self.host_rows = on_host(runner.row_states, config.engine.max_num_seqs)
        if not self.composed:
            runner.warmup(self.caches)  # only a step that is traced may compile
        elif trace is not None:
            runner.attention = _Traced(runner.attention, trace)
            model = runner.model
            trace.names |= {id(m): name for name, m in model.named_modules() if isinstance(m, Linear)}
            trace.names |= {id(p): n.removesuffix(".weight") for n, p in model.named_parameters() if id(p) not in
                            trace.names}
            for i, layer in enumerate(getattr(model, "layers", ())):
                layer.register_forward_pre_hook(partial(self._enter, i))
                layer.register_forward_hook(partial(self._enter, None))

    def _enter(self, layer: int | None, *_: Any) -> None:
        assert self.trace is not None
        self.trace.layer = layer

    def _tell(self, name: str, layer: int | None, value: Any) -> None:
        assert self.trace is not None
        tensor = torch.from_numpy(np.array(value, np.float64))  # torch does not know every dtype of other libraries
        self.trace.calls.append(Call(layer, name if name == "attention" else "linear", name, [], [tensor]))

    @torch.inference_mode()
    def step(self, request: ExecuteModelRequest) -> list[int]:
        """The tokens."""
        move_blocks(request, self.caches, self.num_blocks, self.host, self.runner)
        move_rows(request, self.runner.row_states, self.host_rows)
        load_adapters(request, self.runner)
        m = self.runner.prepare_model_input(request)
        if self.trace is None:
            output = self.runner.execute_model(m, self.caches)
        elif not self.composed:
            self.trace.calls = []
            output = self.runner.execute_traced(m, self.caches, self._tell)
        else:  # called directly, since compiled or captured code would hide the operations
            self.trace.calls = []
            output = self._decode(m) if m.num_steps == 1 else take_steps(m, self.runner.pending, self._decode)
        rows = self.runner.fetch(output)().rows()
        width = max(map(len, rows), default=0)
        return [token for row in rows for token in row + [-1] * (width - len(row))]

    def _decode(self, m: Any) -> Any:
        context = self.runner.forward_context(m, self.caches)
        hidden = self.runner.model(m.input_ids, m.positions, context, None)
        return self.runner.sample(self.runner.head(hidden, m), m)


def bisect(path: Path, device: str, against: str, *, model: str | None = None,
           tolerances: Tolerances | None = None, **options: Any) -> Bisection:
    """Compare `device` with `against` operation by operation, in the order in which the model calls them. Where one of
    the two runners is not composed of operations, the values that both know are compared, with the tolerance of a whole
    model, since errors then add up.

    Args:
        model: the checkpoint. Without it, only the bundled model is read.
        options: engine options of both devices, which replace recorded ones.

    Raises:
        BackendError: a backend is not available, or its runner is neither composed of operations and attention nor
            tells values, or the two tell no value in common.
        ConfigError, WireError: see Recording.load and Recording.config. CapacityError: the caches do not fit.
    """
    recording = Recording.load(path)
    if not recording.paged:
        raise BackendError("only a recording of a runner with paged inputs can be bisected", got=f"{path} without any",
                           hint="hal replay compares its outputs")
    return bisect_recording(recording, device, against, model=model, tolerances=tolerances, **options)


def bisect_recording(recording: Recording, device: str, against: str, *, model: str | None = None,
                     tolerances: Tolerances | None = None, until_divergence: bool = False,
                     **options: Any) -> Bisection:
    """`bisect` of a recording that is loaded. `until_divergence`: look for no token that differs later."""
    table = tolerances or Tolerances()
    options["model"] = model
    first, second = backends.select(against), backends.select(device)
    if not (first.capabilities.fp8_kv and second.capabilities.fp8_kv):
        options = {"kv_dtype": "auto", **options}  # or one side's rounding would count as the other's error
    noted = _Trace(lambda op: 0.0)
    there = _Device(recording, first, against, noted, **options)
    # Both sides may differ from the exact result by as much as their dtype allows.
    followed = _Trace(lambda op: table(op, here.dtype) + table(op, there.dtype))
    here = _Device(recording, second, device, followed, **options)
    alone = None if until_divergence else _Device(recording, second, device, None, **options)
    result = Bisection(device, against)
    for i, step in enumerate(recording.steps):
        expected = there.step(step.request)
        own = expected if alone is None else alone.step(step.request)
        if result.flip is None:
            result.flip = next(((i, row, a, b) for row, (a, b) in enumerate(zip(expected, own, strict=True)) if a != b),
                               None)
        if followed.found is None:
            operations = there.composed and here.composed
            followed.follow = noted.calls if operations else None
            got = here.step(step.request)
            result.calls += len(followed.calls) if operations else _compare_values(followed, noted, result)
            if followed.found is None and got != expected:
                drawn = Call(None, "sampler", "", [], [])
                followed.found = drawn, False, torch.inf, 0.0, torch.nan, torch.nan
            if followed.found is not None:
                call, between, *values = followed.found
                result.divergence = Divergence(i, call, between, *values)
        if result.divergence is not None and (until_divergence or result.flip is not None):
            break
    return result


def _compare_values(here: _Trace, there: _Trace, result: Bisection) -> int:
    """Compare a step's values, layer by layer; `here` takes the first that differs. The number of values compared."""
    got, expected = _told(here.calls), _told(there.calls)
    result.known |= {name for _, name in expected}
    result.told |= {name for _, name in got}
    common = [key for key in expected if key in got]
    if not common:
        raise BackendError("the two runners tell no value in common", got=sorted({name for _, name in got}),
                           expected=f"some of {sorted({name for _, name in expected})}")
    for key in common:
        (call, right), (_, value), tolerance = expected[key], got[key], here.tolerances("model")
        rows = min(len(right), len(value))  # behind the step's tokens lies padding
        error, x, y = _apart(value[:rows], right[:rows])
        if error > tolerance:
            here.found = call, False, error, tolerance, x, y
            break
    return len(common)
