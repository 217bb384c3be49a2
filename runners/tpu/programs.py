"""The programs of the TPU's runner: each is traced with arguments of the right shapes, whose values mean nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from hal.config import WorkerConfig
from hal.contracts.attention import ForwardContext
from hal.models.causal_lm import CausalLM
from hal.paged.row_states import RowStates
from hal.paged.shape_plan import Bucket
from hal.sampling.sampler import logprobs
from hal.schema.fields import Dim
from runners.tpu import lowering
from runners.tpu.adapters import TpuAdapters
from runners.tpu.attention import TpuAttention
from runners.tpu.inputs import ADJUSTED, DRAWN, FILTERED, TpuModelInput
from runners.tpu.sampler import most_likely, sample
from runners.tpu.steps import KINDS, STOPPING, trace_steps

FIELDS = ("input_ids", "positions", "slot_mapping", "query_start_loc", "seq_lens", "block_tables", "logits_indices")
SAMPLERS = {"drawn": DRAWN, "filtered": FILTERED, "adjusted": ADJUSTED}
BLOCKS_AT_ONCE = 8  # one call copies or swaps so many blocks
TOP = 20  # the device finds so many most likely tokens; the host finds more


def schema_dims(name: str) -> tuple[Dim, ...]:
    """The dimensions of an array field of the step's input."""
    array = TpuModelInput.schema.by_name[name].array
    assert array is not None
    return array.dims


def _zeros(name: str, dims: Mapping[str, int]) -> torch.Tensor:
    """An array field of the step's input, on the host."""
    array = TpuModelInput.schema.by_name[name].array
    assert array is not None
    return torch.zeros([d.size(dims) for d in array.dims], dtype=getattr(torch, array.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class ProgramBuilder:
    """Attributes:
        mesh: the devices of tensor parallelism, or None.
        fields: of the step's input, what a step's program takes.
        widths: sizes by their symbols, of what no bucket bounds.
        rows: of the head, for prompt tokens. steps: of a program of several.
    """

    config: WorkerConfig
    dtype: torch.dtype
    mesh: Any
    model: CausalLM
    attention: TpuAttention
    states: RowStates
    adapters: TpuAdapters | None
    fields: tuple[str, ...]
    widths: Mapping[str, int]
    rows: int
    steps: int

    def build(self, name: str, key: Any, kv_caches: Sequence[torch.Tensor]) -> lowering.Program:
        """The program of a name and a key of TpuModelRunner.programs."""
        if name in ("step", "adapted"):
            return self._step(name, key, kv_caches)
        if name in ("steps", "adapted steps"):
            return self._steps(name, *key, kv_caches)
        if name == "logprobs":
            return self._logprobs(key)
        if name == "head":
            return self._head(key)
        if name in ("read", "write"):
            return self._move(name, kv_caches)
        return self._sampler(name, key)

    def _step(self, name: str, bucket: Bucket, kv_caches: Sequence[torch.Tensor]) -> lowering.Program:
        decode, dims = bucket.kind == "decode", bucket.dims
        seqs, blocks = dims["num_seqs"], dims["max_blocks"]
        tokens = dims.get("num_tokens", seqs)
        shapes = [(tokens,)] * 3 + [(seqs + 1,), (seqs,), (seqs, blocks), (seqs,)]
        shapes += [(seqs,)] * (len(self.fields) - len(FIELDS))
        arguments = lowering.to_device([torch.zeros(shape, dtype=torch.int32) for shape in shapes])
        first, last = self.config.topology.is_first_stage, self.config.topology.is_last_stage
        if not first:
            state = torch.zeros(tokens, self.config.model.hidden_size, dtype=self.dtype)
            arguments += lowering.to_device([state.clone() for _ in self.model.intermediates])
        plain = len(arguments)
        arguments += self._of_adapters(name, tokens)
        size = self.config.engine.block_size

        def step(given: Sequence[torch.Tensor], caches: Sequence[torch.Tensor]) -> Any:
            m: Any = SimpleNamespace(**dict(zip(self.fields, given, strict=False)), block_size=size,
                                     max_query_len=int(decode),
                                     adapter_slots=given[plain] if len(given) > plain else None)
            before = None if first else self.model.make_intermediate(*given[len(self.fields):plain])
            new, hidden = self._hidden(m, caches, decode, before)
            if not last:
                return new, [self._whole(hidden[name]) for name in self.model.intermediates]
            return new, [self._whole(hidden), *self._logits(m, hidden)]

        return lowering.Program(step, arguments, [*kv_caches, *self.states.tensors])

    def _of_adapters(self, name: str, tokens: int) -> list[torch.Tensor]:
        """The arguments that a program of this kind takes of adapters."""
        if not name.startswith("adapted") or self.adapters is None:
            return []
        return [*lowering.to_device([torch.zeros(tokens, dtype=torch.int32)]), *self.adapters.tensors()]

    def _hidden(self, m: Any, caches: Sequence[torch.Tensor], decode: bool, before: Any = None,
                ) -> tuple[list[torch.Tensor], Any]:
        """The caches and the states after a step, and what its model returns. `caches` have the states behind them."""
        paged = len(self.model.attention_specs)
        attention = self.attention.begin(m, caches[:paged], decode)
        states = self.states.over([x.clone() for x in caches[paged:]])
        context = ForwardContext(attention, m, states.begin(m) if self.states.tensors else None)
        if self.adapters is not None:
            self.adapters.begin(m.adapter_slots)
        hidden = self.model(m.input_ids, m.positions, context, before)
        return [*(self._split(cache) for cache in attention.caches), *states.tensors], hidden

    def _logits(self, m: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each sampled token: the logits behind it, the most likely next token, and its position."""
        logits = self.model.compute_logits(hidden.index_select(0, m.logits_indices)).contiguous()
        return self._whole(logits), most_likely(logits), m.positions.index_select(0, m.logits_indices)

    def _steps(self, which: str, bucket: Bucket, kind: str, kv_caches: Sequence[torch.Tensor]) -> lowering.Program:
        dims = {**bucket.dims, **dict.fromkeys(("num_tokens", "num_logits", "num_sampled"), bucket.dims["num_seqs"]),
                **self.widths}
        names = (*self.fields, *STOPPING, *KINDS[kind])
        arguments = [_zeros(name, dims) for name in names]

        def forward(m: TpuModelInput, caches: Sequence[torch.Tensor]) -> Any:
            new, hidden = self._hidden(m, caches, decode=True)
            return new, *self._logits(m, hidden)

        def steps(given: Sequence[torch.Tensor], caches: Sequence[torch.Tensor]) -> Any:
            fields = (*names, "adapter_slots") if of_adapters else names
            return trace_steps(forward, dict(zip(fields, given, strict=False)), caches, self.config.engine.block_size,
                               self.steps)

        of_adapters = self._of_adapters(which, bucket.dims["num_seqs"])
        return lowering.Program(steps, [*lowering.to_device(arguments), *of_adapters],
                                [*kv_caches, *self.states.tensors])

    def _move(self, name: str, kv_caches: Sequence[torch.Tensor]) -> lowering.Program:
        ids, = lowering.to_device([torch.zeros(BLOCKS_AT_ONCE, dtype=torch.int64)])

        def read(given: Sequence[torch.Tensor], _: Sequence[torch.Tensor]) -> Any:
            return [], [self._whole(cache[0].index_select(0, given[0])[None]) for cache in given[1:]]

        def write(given: Sequence[torch.Tensor], caches: Sequence[torch.Tensor]) -> Any:
            new = [cache.view(cache.shape[1:]).index_copy(0, given[0], v.view(v.shape[1:])).view(cache.shape)
                   for cache, v in zip(caches, given[1:], strict=True)]
            return [self._split(cache) for cache in new], []

        if name == "read":
            return lowering.Program(read, [ids, *kv_caches])
        values = [torch.zeros(1, BLOCKS_AT_ONCE, *cache.shape[2:], dtype=self.dtype) for cache in kv_caches]
        return lowering.Program(write, [ids, *lowering.to_device(values)], kv_caches)

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.mesh is None else lowering.shard(tensor, self.mesh, None)

    def _split(self, cache: torch.Tensor) -> torch.Tensor:
        return cache if self.mesh is None else lowering.shard(cache, self.mesh, 3)

    def _sampler(self, name: str, rows: int) -> lowering.Program:
        fields, dims = SAMPLERS[name], {"num_sampled": rows, **self.widths}
        arguments = [*self._rows(rows, self.config.model.vocab_size), *(_zeros(field, dims) for field in fields)]
        absent = dict.fromkeys(ADJUSTED)

        def program(given: Sequence[torch.Tensor], _: Sequence[torch.Tensor]) -> Any:
            return [], [sample(given[0], given[1], absent | dict(zip(fields, given[2:], strict=True)))]

        return lowering.Program(program, lowering.to_device(arguments))

    def _logprobs(self, rows: int) -> lowering.Program:
        return lowering.Program(lambda given, _: ([], logprobs(given[0], given[1], TOP)),
                                lowering.to_device(self._rows(rows, self.config.model.vocab_size)))

    def _head(self, tokens: int) -> lowering.Program:
        return lowering.Program(
            lambda given, _: ([], [self.model.compute_logits(given[0].index_select(0, given[1])).contiguous()]),
            lowering.to_device(self._rows(tokens, self.config.model.hidden_size, self.rows)))

    def _rows(self, count: int, width: int, indices: int | None = None) -> list[torch.Tensor]:
        """Values of `width` in each of `count` rows, and one index for each row, or `indices` of them."""
        return [torch.zeros(count, width, dtype=self.dtype),
                torch.zeros(count if indices is None else indices, dtype=torch.int32)]
