"""The TPU's runner: static shapes, compiled before the first step as far as the compile budget goes, and the others
when a step first needs them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from itertools import accumulate
from time import monotonic
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from hal.config import AUTO_STEPS, WorkerConfig
from hal.contracts.cache import RowState
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import NULL_BLOCK, IntermediateTensors
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import ModelRunnerBase, Progress, no_progress
from hal.errors import BackendError, StateError
from hal.features.bias import MOST_TOKENS
from hal.features.masks import WORD
from hal.models.causal_lm import CausalLM
from hal.paged.batch import BatchState
from hal.paged.row_states import RowStates
from hal.paged.shape_plan import Bucket
from hal.profiling import span
from hal.sampling.sampler import TokenLogprobs, logprobs
from hal.sampling.verification import verify
from hal.schema.packed import packed_source
from runners.tpu import lowering
from runners.tpu.adapters import TpuAdapters
from runners.tpu.attention import TILE, TpuAttention
from runners.tpu.inputs import ADJUSTED, TpuModelInput, bucket_for, fit, stage
from runners.tpu.plan import budget, by_need, make_plan
from runners.tpu.programs import BLOCKS_AT_ONCE, FIELDS, SAMPLERS, TOP, ProgramBuilder, schema_dims
from runners.tpu.spmd import load
from runners.tpu.steps import KINDS, STOPPING, Steps, kind_of

QUIET = 5.0  # the user is not told of compiling that takes fewer seconds
SMALL = 0.1  # what a program that is not a step's takes to compile, in step programs (measured)


class TpuModelRunner(ModelRunnerBase[TpuModelInput]):
    """Programs, by name: ("step", bucket) from a step's input to logits and the most likely token; ("drawn" and so on,
    sequences) the samplers; ("logprobs", rows); ("head", tokens) logits of prompt tokens; ("steps",
    (bucket, kind)) several decode steps with their sampling. Token ids leave the device, and logprobs where they were
    asked for.

    Attributes:
        plan: the shapes. mesh: the devices of tensor parallelism, or None.
        late, uncompiled: of the programs that the warm-up had no time for, the number compiled since then, when a step
            first needed them, and the number that no step has needed yet.
    """

    input_type, output_type = TpuModelInput, SamplerOutput
    verifies = multi_step = True
    model: CausalLM

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator)
        engine = config.engine
        self.tokens_per_row = engine.max_samples
        steps = AUTO_STEPS if engine.steps_per_message == "auto" else engine.steps_per_message
        self.steps = steps if engine.pp == engine.max_samples == 1 else 1  # of one program
        if engine.async_scheduling:
            raise BackendError("backend 'tpu' does not keep pending tokens on the device", got="async_scheduling=True",
                               expected="async_scheduling=False")
        self.dtype: torch.dtype = getattr(torch, config.model.dtype if engine.dtype == "auto" else engine.dtype)
        self.mesh = lowering.use_mesh(engine.tp) if engine.tp > 1 else None
        self.plan = make_plan(config)
        self.seq_rungs = sorted({b.dims["num_seqs"] for b in self.plan.buckets()})
        self.state = BatchState(engine.max_num_seqs, config.max_model_len, engine.block_size, config.model.vocab_size,
                                self.input_type)
        self.widths = {"max_history": config.max_model_len, "max_bias": MOST_TOKENS,
                       "mask_words": -(-config.model.vocab_size // WORD)}
        unknown = sorted({d.symbol for name in ADJUSTED for d in schema_dims(name)} - {"num_sampled", *self.widths})
        if unknown:
            raise BackendError("backend 'tpu' does not know the size of a step feature's fields",
                               got=", ".join(unknown), expected=", ".join(self.widths),
                               hint="run without HAL_FEATURES, or on another device")
        self.programs: dict[tuple[str, Any], lowering.Program] = {}
        self._planned = 0
        self.strict = os.environ.get("HAL_STRICT") == "1"

    @property
    def compiled(self) -> int:  # type: ignore[override]
        return lowering.compiles()

    def load_model(self, progress: Progress = no_progress) -> None:
        engine = self.config.engine
        self.model = load(engine, self.config.model, self.config.topology.pp_rank, self.dtype, self.mesh, progress)
        self.intermediate_type = self.model.intermediate_type
        self.has_row_states = any(isinstance(cache, RowState) for cache in self.model.caches)
        self.state.has_row_states = self.has_row_states
        self.fields = (*FIELDS, *(("state_rows",) if self.has_row_states else ()))
        self.states = RowStates(self.model.state_specs, engine.max_num_seqs, lowering.device())
        self.row_states = self.states.tensors
        kernel = lowering.device_kind() == "TPU" and engine.tp == 1
        self.adapters = None
        if engine.max_adapters:
            self.adapters = TpuAdapters(self.model, engine, self.config.topology.pp_rank, self.mesh)
        self.attention = TpuAttention(self.model.attention_specs, ranks=engine.tp, kernel=kernel)
        self.builder = ProgramBuilder(
            self.config, self.dtype, self.mesh, self.model, self.attention, self.states, self.adapters, self.fields,
            self.widths, rows=self.seq_rungs[-1], steps=self.steps)

    def load_adapter(self, slot: int, path: str) -> None:
        assert self.adapters is not None
        self.adapters.load(slot, path)

    def _cache_shapes(self, num_blocks: int) -> list[tuple[int, ...]]:
        return [self.attention.cache_shape(spec, num_blocks, self.config.engine.block_size)
                for spec in self.model.attention_specs]

    def kv_bytes_per_block(self) -> int:
        return sum(map(math.prod, self._cache_shapes(1))) * self.dtype.itemsize // self.config.engine.tp

    def reserve_bytes(self) -> int:
        """Bytes of the largest step: activations of a layer, the contexts that its tiles gather, scores, and the
        sampler's copies of the logits. An upper estimate."""
        engine, c, specs = self.config.engine, self.config.model, self.model.attention_specs
        tokens, item = max(engine.max_num_batched_tokens, engine.max_num_seqs), self.dtype.itemsize
        tiles = tokens // TILE + engine.max_num_seqs
        keys = tiles * self.config.max_model_len
        contexts = 2 * keys * max((spec.num_kv_heads * 2 * spec.head_dim for spec in specs), default=0) * item
        scores = keys * TILE * max((spec.num_heads for spec in specs), default=0) * (item + 8)
        layer = tokens * (6 * c.hidden_size + 3 * c.intermediate_size // engine.tp) * item
        samples = min(engine.max_num_seqs * max(engine.max_samples, self.steps), tokens * self.steps)
        adapters = 0 if self.adapters is None else 3 * tokens * self.adapters.width * item
        return adapters + contexts + scores + layer + samples * c.vocab_size * (item + 24)

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        return [lowering.zeros(shape, self.dtype, self.mesh, 3) for shape in self._cache_shapes(num_blocks)]

    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        """Compile the programs, or read them from the persistent cache, until the budget is spent. None runs yet."""
        keys, start, limit = self._all_programs(), monotonic(), budget()
        for done, (name, key) in enumerate(keys):
            spent = monotonic() - start
            if spent >= limit:
                break
            if done == 1:
                self._tell(keys, spent, limit)
            progress("compiling", done, len(keys))
            self._compile(name, key, kv_caches)
        progress("compiling", len(keys), len(keys))
        self._planned = len(keys)
        lowering.wait()

    @property
    def uncompiled(self) -> int:  # type: ignore[override]
        return self._planned - len(self.programs)

    def _all_programs(self) -> list[tuple[str, Any]]:
        """Keys of `programs`, in the order in which the warm-up makes them."""
        steps = by_need(self.plan, largest_first=lowering.device_kind() != "CPU")
        names = {"step": "steps"} if self.adapters is None else {"step": "steps", "adapted": "adapted steps"}
        keys: list[tuple[str, Any]] = [(name, bucket) for name in names for bucket in steps]
        if self.config.topology.is_last_stage:
            keys += [(name, rows) for rows in self.seq_rungs for name in (*SAMPLERS, "logprobs")]
            tokens = {b.dims.get("num_tokens", b.dims["num_seqs"]) for b in steps}
            keys += [("head", count) for count in sorted(tokens)]
            keys += [(name, (bucket, kind)) for name in names.values() for kind in KINDS for bucket in steps
                     if bucket.kind == "decode" and self.steps > 1]
        return [*keys, ("read", None), ("write", None)]

    def _tell(self, keys: Sequence[tuple[str, Any]], each: float, limit: float) -> None:
        """Write one line to the standard error if compiling takes long; `each` is the time of the first program."""
        steps = {"step": 1, "adapted": 1, "steps": self.steps, "adapted steps": self.steps}
        costs = [steps.get(name, SMALL) * each for name, _ in keys]
        now = sum(end - cost < limit for end, cost in zip(accumulate(costs), costs, strict=True))
        if self.config.topology.rank == 0 and min(sum(costs), limit) > QUIET:
            tqdm.write(f"hal: compiling about {now} of {len(keys)} XLA programs, for at most {limit:g} seconds; the "
                       "others are compiled when they are first needed. To start sooner, set HAL_COMPILE_BUDGET to "
                       "fewer seconds or lower max_num_seqs or max_num_batched_tokens.", file=sys.stderr)

    def _compile(self, name: str, key: Any, kv_caches: Sequence[torch.Tensor]) -> None:
        self.programs[name, key] = self.builder.build(name, key, kv_caches)

    def _program(self, name: str, key: Any, kv_caches: Sequence[torch.Tensor] = ()) -> lowering.Program:
        """A program of the plan. It is compiled here if the warm-up had no time for it."""
        if (name, key) not in self.programs:
            before = self.compiled
            self._compile(name, key, kv_caches)
            self.late += self.compiled - before
        return self.programs[name, key]

    def read_blocks(self, kv_caches: Sequence[torch.Tensor], blocks: torch.Tensor,  # type: ignore[override]
                    ) -> list[torch.Tensor]:
        """On the host, in pieces of one shape."""
        parts = []
        for at in range(0, len(blocks), BLOCKS_AT_ONCE):
            ids, count = self._some_blocks(blocks, at)
            parts.append([x.cpu()[:, :count] for x in self._program("read", None, kv_caches)([ids, *kv_caches])])
        return [torch.cat(of_layer, 1) for of_layer in zip(*parts, strict=True)]

    def write_blocks(self, kv_caches: Sequence[torch.Tensor], blocks: torch.Tensor,  # type: ignore[override]
                     values: Sequence[torch.Tensor]) -> None:
        for at in range(0, len(blocks), BLOCKS_AT_ONCE):
            ids, count = self._some_blocks(blocks, at)
            fill = (0, 0) * (values[0].ndim - 2) + (0, BLOCKS_AT_ONCE - count)
            some = lowering.to_device([F.pad(v[:, at:at + count], fill) for v in values])
            self._program("write", None, kv_caches)([ids, *some], kv_caches)

    @staticmethod
    def _some_blocks(blocks: torch.Tensor, at: int) -> tuple[torch.Tensor, int]:
        """Those from `at` on and the null block in place of what is missing, and how many they are."""
        some = blocks[at:at + BLOCKS_AT_ONCE]
        ids, = lowering.to_device([F.pad(some, (0, BLOCKS_AT_ONCE - len(some)), value=NULL_BLOCK)])
        return ids, len(some)

    def prepare_model_input(self, request: ExecuteModelRequest) -> TpuModelInput:
        self.state.apply(request)
        packed: Any = self.state.prepare(request)
        return stage(fit(packed, self.plan, self.widths))

    def execute_model(self, model_input: TpuModelInput, kv_caches: Sequence[torch.Tensor],
                      intermediate: IntermediateTensors | None = None) -> SamplerOutput | IntermediateTensors | None:
        lowering.settle([*kv_caches, *self.row_states])
        m, before = model_input, self.compiled - self.late
        packed = packed_source(m) or TpuModelInput.schema.pack(m)
        fitted = fit(packed, self.plan, self.widths)
        if fitted is not packed:
            m, packed = stage(fitted), fitted
        bucket = bucket_for(self.plan, packed)
        if m.num_steps > 1:
            output: SamplerOutput | IntermediateTensors = self._take_steps(m, bucket, kv_caches)
        else:
            output = self._take_step(m, packed, bucket, kv_caches, intermediate)
        if self.strict and self.compiled - self.late != before:
            raise StateError("a step compiled a program", got=self.compiled - self.late - before, expected=0,
                             hint=f"{bucket} is in the plan: look for a tensor operation outside the programs")
        return output

    def _take_step(self, m: TpuModelInput, packed: Any, bucket: Bucket, kv_caches: Sequence[torch.Tensor],
                   intermediate: IntermediateTensors | None) -> SamplerOutput | IntermediateTensors:
        arguments = [m[name] for name in self.fields]
        seqs, sampled = bucket.dims["num_seqs"], FIELDS.index("logits_indices")
        if arguments[sampled].shape[0] != seqs:  # rows for prompt logprobs follow
            arguments[sampled], = lowering.to_device([torch.from_numpy(packed.arrays["logits_indices"][:seqs])])
        if intermediate is not None:
            arguments += [intermediate[name] for name in self.model.intermediates]
        name, of_adapters = self._adapted(m, "step", "adapted")
        results = self._program(name, bucket, kv_caches)([*arguments, *of_adapters], [*kv_caches, *self.row_states])
        if self.config.topology.is_last_stage:
            with span("sample"):
                return self._sample(m, packed, *results)
        stage: IntermediateTensors = self.model.make_intermediate(*results)
        return stage

    def _adapted(self, m: TpuModelInput, plain: str, adapted: str) -> tuple[str, list[torch.Tensor]]:
        """The kind of program of a step, and what the program takes of adapters."""
        if m.adapter_slots is None or self.adapters is None:
            return plain, []
        return adapted, [m.adapter_slots, *self.adapters.tensors()]

    def _take_steps(self, m: TpuModelInput, bucket: Bucket, kv_caches: Sequence[torch.Tensor]) -> SamplerOutput:
        """The steps of a message by one program of `self.steps`: where the message has fewer, all rows have stopped
        before the rest."""
        kind, n = kind_of(m), m.num_samples
        if m.num_steps > self.steps:
            raise StateError("a message has more decode steps than the programs take", got=m.num_steps,
                             expected=f"at most steps_per_message={self.steps}")
        names, state = (*self.fields, *STOPPING, *KINDS[kind]), [*kv_caches, *self.row_states]
        name, of_adapters = self._adapted(m, "steps", "adapted steps")
        found = Steps.of(self._program(name, (bucket, kind), kv_caches)([*(m[n] for n in names), *of_adapters], state))
        tokens = found.token_ids.cpu().view(-1, self.steps)[:n, :m.num_steps]
        counts, beside = found.counts.cpu()[:n], dict[str, torch.Tensor]()
        if m.num_logprobs >= 0:
            parts = [self._logprobs(logits, taken, m.num_logprobs)
                     for logits, taken, _ in zip(found.logits, found.taken, range(m.num_steps), strict=False)]
            beside = TokenLogprobs(*(torch.stack(column, 1)[:n].flatten(0, 1)
                                     for column in zip(*parts, strict=True))).fields()
        return SamplerOutput(token_ids=tokens.flatten(), counts=counts, num_computed=counts - 1, **beside)

    def _sample(self, m: TpuModelInput, packed: Any, hidden: torch.Tensor, logits: torch.Tensor, greedy: torch.Tensor,
                positions: torch.Tensor) -> SamplerOutput:
        n, seqs = m.num_samples, logits.shape[0]
        tokens = greedy
        for name in reversed(SAMPLERS):
            if all(m[field] is not None for field in SAMPLERS[name]):
                tokens, = self._program(name, seqs)([logits, positions, *(m[field] for field in SAMPLERS[name])])
                break
        found: dict[str, torch.Tensor] = {}
        if m.num_logprobs >= 0:
            found = TokenLogprobs(*(x[:n] for x in self._logprobs(logits, tokens, m.num_logprobs))).fields()
        output = SamplerOutput(token_ids=tokens.cpu()[:n], **found)
        if m.sample_counts is not None:  # on the host, where the sampled tokens are
            ids, at = (torch.from_numpy(packed.arrays[name]) for name in ("input_ids", "logits_indices"))
            drafts = ids[(at[:n] + 1).clamp(max=len(ids) - 1)]
            output = verify(output, drafts, torch.from_numpy(packed.arrays["sample_counts"]), m.max_samples)
        if m.prompt_targets is not None:
            for name, value in self._prompt_logprobs(packed, hidden, m.num_prompt_logprobs).items():
                setattr(output, name, value)
        return output

    def _logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, top: int) -> TokenLogprobs:
        """On the host."""
        if top > TOP:
            return logprobs(logits.cpu(), tokens.cpu(), top)
        chosen, ranks, ids, values = (x.cpu() for x in self._program("logprobs", logits.shape[0])([logits, tokens]))
        top = max(top, 0)
        return TokenLogprobs(chosen, ranks, ids[:, :top].contiguous(), values[:, :top].contiguous())

    def _prompt_logprobs(self, packed: Any, hidden: torch.Tensor, top: int) -> dict[str, torch.Tensor]:
        rows, n = self.seq_rungs[-1], packed.values["num_samples"]
        targets = packed.arrays["prompt_targets"]
        indices = packed.arrays["logits_indices"][n:n + len(targets)]
        parts = []
        for at in range(0, len(targets), rows):
            some = np.zeros((2, rows), np.int32)
            count = min(rows, len(targets) - at)
            some[:, :count] = indices[at:at + rows], targets[at:at + rows]
            which, wanted = lowering.to_device(list(torch.from_numpy(some)))
            logits, = self._program("head", hidden.shape[0])([hidden, which])
            parts.append([x[:count] for x in self._logprobs(logits, wanted, top)])
        return TokenLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True))).fields("prompt_")
