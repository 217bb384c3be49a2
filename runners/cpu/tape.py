"""A decode step as one call. The model's operations are noted once, and C then runs the list (tape.c).

What a graph is to a GPU, this is to a CPU: between two operations there is no Python, no dispatch of PyTorch, and no
thread to wake. With tensor parallelism the sums over ranks are operations too, by the communicator's C function. Where
it has none, C returns to Python at a sum, and goes on when the communicator was called as it is without a tape.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hal.contracts.communicator import AxisName, Communicator
from hal.contracts.inputs import PagedModelInput
from hal.errors import StateError
from hal.weights.grid import GridScheme
from runners.cpu.compiled import Operation, Step
from runners.cpu.grids import GridWeight
from runners.cpu.linears import DenseWeight, Kernels, call_kernel

if TYPE_CHECKING:
    from hal.models.layers import Linear
    from runners.cpu.attention import CpuStep

ROWS = 16  # sequences of the largest step on a tape; more of them are limited by arithmetic
_NEW = {"empty", "new_empty", "empty_like", "detach", "alias"}  # what is in new memory, no operation may read

Code = IntEnum("Code", "EMBED ROTARY NORM GATED COPY LINEAR FEW_BITS ATTEND CALL", start=0)  # in the order of tape.c


class Untaped(Exception):
    """The forward pass has an operation that a tape has not."""


@contextlib.contextmanager
def replaced(owner: object, **methods: Callable[..., Any]) -> Iterator[None]:
    """Within the context the object has these methods in place of its class's."""
    vars(owner).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(owner)[name]


class Recorder(TorchDispatchMode):
    """Notes the operations of a decode step in place of computing them. CpuOps calls its methods, and it sees each
    operation of PyTorch that the model calls beside them. It knows views, the look-up of embeddings and concatenation;
    any other stops the recording, as does an operation that reads what no noted operation has written. So a tape
    computes the whole step.

    Args:
        m: an input of as many decoding sequences as the tape shall take.
        communicator: its collectives over tp are noted where `all_reduce` and `all_gather` stand in for them. None is
            called while the step is recorded, so ranks need not agree on what can be recorded.

    Attributes:
        calls: by the number of an operation where C may return to Python, what Python then does with the step's tokens.
        part: this rank's logits, which are gathered at the end; None where they are whole.
    """

    def __init__(self, m: PagedModelInput, dtype: torch.dtype, communicator: Communicator) -> None:
        super().__init__()
        self.m, self.rows, self.dtype, self.communicator = m, len(m.input_ids), dtype, communicator
        self.calls: dict[int, Callable[[torch.Tensor], object]] = {}
        self.part: torch.Tensor | None = None
        self.operations: list[Operation] = []
        self.kept: list[Any] = []  # what the operations' addresses point to
        self.written: set[int] = set()  # the memory of noted results

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler, which takes two seconds, so that it leaves the next method alone."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "embedding":
            return self.embed(*args)
        if name == "cat":
            return self.cat(*args)
        if func._schema.is_mutable:
            raise Untaped(name)
        found = func(*args, **kwargs or {})
        views = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for one in found if isinstance(found, (tuple, list)) else (found,):
            view = isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() in views
            if not view and name not in _NEW:
                raise Untaped(name)
        return found

    def _result(self, *shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=self.dtype)
        self.kept.append(made)
        self.written.add(made.untyped_storage().data_ptr())
        return made

    def _read(self, x: torch.Tensor, rows_only: bool = False) -> int:
        """The address of an argument, whose rows lie one behind the other, or only each in one piece."""
        whole = x[0].is_contiguous() if rows_only else x.is_contiguous()
        if not whole or len(x) != self.rows or x.dtype != self.dtype or (
                x.untyped_storage().data_ptr() not in self.written):
            raise Untaped("an argument of another form, or of an operation that was not noted")
        return x.data_ptr()

    def _note(self, code: Code, **fields: Any) -> None:
        self.operations.append(Operation(code=code, bf16=self.dtype == torch.bfloat16, **fields))

    def _call(self, then: Callable[[torch.Tensor], object], **fields: Any) -> None:
        self.calls[len(self.operations)] = then
        self._note(Code.CALL, **fields)

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        def reduce(ids: torch.Tensor) -> None:
            own = x[:len(ids)]
            total = self.communicator.all_reduce(own, axis)
            if total.data_ptr() != own.data_ptr():
                own.copy_(total)

        at, sums = self._read(x), self.communicator.native_sums
        if sums is None or axis != "tp":
            self._call(reduce)
        else:
            self._call(lambda ids: sums.finish(x[:len(ids)]), y=at, width=x[0].numel(), weight=sums.function,
                       also=sums.state)
        return x

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        """Of the logits. An operation that reads the result stops the recording, since no operation has written it."""
        if dim != -1 or x.ndim != 2 or self.part is not None:
            raise Untaped("a gather of something else than the logits")
        self._read(x)
        self.part = x
        return x.new_empty(self.rows, x.shape[1] * self.communicator.topology.axis(axis).size)

    def embed_shared(self, layer: Callable[[torch.Tensor], torch.Tensor], width: int, ids: torch.Tensor,
                     ) -> torch.Tensor:
        """The embeddings where ranks share the table. The layer's few operations run as they do without a tape."""
        if ids.data_ptr() != self.m.input_ids.data_ptr():
            raise Untaped("embedding of something else than the step's tokens")
        y = self._result(self.rows, width)
        self._call(lambda ids: y[:len(ids)].copy_(layer(ids)))
        return y

    def embed(self, table: torch.Tensor, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        if ids.data_ptr() != self.m.input_ids.data_ptr() or table.stride(1) != 1 or table.dtype != self.dtype:
            raise Untaped("embedding of something else than the step's tokens")
        y = self._result(self.rows, table.shape[1])
        self.kept.append(table)
        self._note(Code.EMBED, weight=table.data_ptr(), y=y.data_ptr(), width=table.shape[1], x_stride=table.stride(0),
                   table_rows=len(table))
        return y

    def cat(self, parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        if dim % parts[0].ndim != 1:
            raise Untaped("cat of rows")
        y = self._result(self.rows, sum(part.shape[1] for part in parts), *parts[0].shape[2:])
        at, each = y.data_ptr(), y.element_size()
        for part in parts:
            width = part[0].numel()
            self._note(Code.COPY, x=self._read(part, rows_only=True), y=at, width=width, x_stride=part.stride(0),
                       y_stride=y.stride(0))
            at += width * each
        return y

    def norm(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
             ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Ops.add_rms_norm, and without a residual as Ops.rms_norm; then the second result is x."""
        y, total = self._result(*x.shape), x
        fields: dict[str, Any] = {}
        if residual is not None:
            total = self._result(*x.shape)
            self._read(x)
            fields = {"also": self._read(residual), "sum": total.data_ptr()}
        self.kept.append(weight)
        self._note(Code.NORM, x=self._read(x, rows_only=True), weight=weight.data_ptr(), y=y.data_ptr(),
                   width=x.shape[-1], parts=x[0].numel() // x.shape[-1], x_stride=x.stride(0), y_stride=y.stride(0),
                   eps=eps, wide_weight=weight.dtype == torch.float32, **fields)
        return y, total

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        y = self._result(self.rows, gate_up.shape[1] // 2)
        self._note(Code.GATED, x=self._read(gate_up), y=y.data_ptr(), width=y.shape[1], x_stride=gate_up.stride(0))
        return y

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        weight = layer.packed
        if not isinstance(weight, DenseWeight | GridWeight) or weight.native is None:
            raise Untaped("a product that the kernels do not compute")
        if isinstance(weight, GridWeight) and isinstance(layer.scheme, GridScheme) and layer.scheme.inputs != "exact":
            raise Untaped("inputs of a product that are rounded")
        y = self._result(self.rows, weight.outputs)
        self.kept.append(weight)
        code = Code.LINEAR if isinstance(weight, DenseWeight) else Code.FEW_BITS
        self._note(code, x=self._read(x), weight=weight.address, y=y.data_ptr(), width=weight.outputs,
                   x_stride=x.stride(0))
        return y

    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if positions.data_ptr() != self.m.positions.data_ptr() or not table.is_contiguous():
            raise Untaped("rotary angles of something else than the step's positions")
        cos, sin = (self._result(self.rows, 1, table.shape[1]) for _ in range(2))
        self.kept.append(table)
        self._note(Code.ROTARY, weight=table.data_ptr(), y=cos.data_ptr(), sum=sin.data_ptr(), width=table.shape[1],
                   table_rows=len(table))
        return cos, sin

    def attend(self, step: CpuStep, layer: int, qkv: torch.Tensor, begun: tuple[torch.Tensor, torch.Tensor],
               ) -> torch.Tensor:
        spec = step.attention.specs[layer]
        y = self._result(self.rows, spec.num_heads * spec.head_dim)
        self._read(qkv)
        native = step.attention.native(qkv, y, step.kv_caches[layer], spec, begun)
        self.kept.append((native, step))
        self._note(Code.ATTEND, decode=ctypes.addressof(native))
        return y


class Tape:
    """A recorded step.

    Args:
        logits: [rows, vocab_size], the last result that `recorder` has noted, or the gathered one.

    Attributes:
        rows: sequences of the largest step.
        taken: by number of sequences, whether steps of so many shall run on the tape. steps: that have run on it.
    """

    def __init__(self, recorder: Recorder, logits: torch.Tensor, kernels: Kernels) -> None:
        self.kept, self.logits, self.functions = recorder.kept, logits, kernels.functions
        self.part, self.communicator = recorder.part, recorder.communicator
        self.operations = (Operation * len(recorder.operations))(*recorder.operations)
        self.rows, self.taken = recorder.rows, [False] + [True] * recorder.rows
        self.steps, self.calls = 0, recorder.calls
        self.handle = kernels.functions.hal_tape(ctypes.addressof(self.operations), len(self.operations), self.rows)
        if not self.handle:
            raise MemoryError("there is no memory for a recorded step")

    def described(self) -> str:
        """The numbers of sequences whose steps run on it, for people."""
        numbers = [n for n in range(1, self.rows + 1) if self.taken[n]]
        if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"{numbers[0]} to {numbers[-1]}"
        return ", ".join(map(str, numbers)) or "no number of"

    def takes(self, m: PagedModelInput) -> bool:
        """Whether all sequences of the step decode and are sampled, and nothing else is asked for."""
        n = m.num_decode_seqs
        return (n < len(self.taken) and self.taken[n] and n == m.num_samples == len(m.logits_indices)
                == len(m.seq_lens) == len(m.input_ids) and m.sample_counts is None and m.adapter_slots is None)

    def run(self, ids: torch.Tensor, m: PagedModelInput) -> torch.Tensor:
        """Logits [num_seqs, vocab_size] in memory that the next step may write again. ids: int32 [num_seqs]."""
        n, tables = len(ids), m.block_tables
        if tables.stride(1) != 1:
            tables = tables.contiguous()
        step = Step(ids.data_ptr(), m.positions.data_ptr(), m.seq_lens.data_ptr(), m.slot_mapping.data_ptr(),
                    tables.data_ptr(), n, tables.stride(0))
        threads, at, sums = torch.get_num_threads(), 0, self.communicator.native_sums or contextlib.nullcontext()
        while at < len(self.operations):
            with sums:
                at = call_kernel(self.functions.hal_tape_run, self.handle, ctypes.addressof(step), at, threads)
            if at == -1:
                raise MemoryError("attention found no memory for its scores")
            if at < 0:
                raise StateError("a step has a token or a position outside of the model's tables",
                                 got=f"tokens {ids.tolist()} at positions {m.positions.tolist()}",
                                 expected="tokens of the vocabulary, at positions of the context")
            if at < len(self.operations):
                self.calls[at](ids)
                at += 1
        self.steps += 1
        if self.part is None:
            return self.logits[:n]
        return self.communicator.all_gather(self.part[:n])[:, :self.logits.shape[1]]

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.functions.hal_tape_free(self.handle)
