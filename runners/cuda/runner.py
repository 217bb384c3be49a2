"""The CUDA runner: the default runner with Triton kernels, staged inputs, and steps of few tokens as CUDA graphs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from hal.config import WorkerConfig
from hal.contracts.advance import Taken
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import NULL_BLOCK, IntermediateTensors, PagedModelInput, SamplingInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import SamplingRequest
from hal.contracts.runner import OutputT, Progress, no_progress
from hal.errors import BackendError, CapacityError
from hal.features import adjusting
from hal.features.stopping import STOP_IDS
from hal.paged.runner import Forwarded, PagedModelRunner
from hal.paged.shape_plan import ShapePlan
from hal.paged.steps import joined
from hal.schema import stays
from hal.schema.packed import Packed, packed_source
from runners.cuda.attention import CudaAttention
from runners.cuda.graphs import PENDING, Results, Run, StepGraph, capture, graph_dims, graph_plan, prompt_sizes
from runners.cuda.invariant import InvariantAttention, InvariantOps
from runners.cuda.kernels import elementwise
from runners.cuda.kernels.sampling import greedy
from runners.cuda.ops import CudaOps
from runners.cuda.sampler import CudaSampler
from runners.cuda.staging import Fetcher, PinnedRing

_ADVANCED = "input_ids", "positions", "slot_mapping", "seq_lens", "pending_rows"  # of a graph's input, by one kernel
_MEASURED = {1, 2, 4, 8, 16, 32, 64, 128, 256}  # sequences of rounds of speculative decoding that are measured
_ROOM = 64 << 10  # bytes behind a graph's input for the sampling fields of a step
_GRAPH_BYTES = 1 << 30  # that graphs are expected to take beside their pool's activations


class CudaModelInput(PagedModelInput):
    """A paged batch. A step that runs as a graph is padded to the sizes of that graph."""


class CudaModelRunner(PagedModelRunner):
    """Attributes:
        plan: the sizes that have a graph; none when every step is eager.
        graphs: of decode steps, by batch size.
        several: of steps with several tokens a sequence, by batch size and tokens of a sequence (see `queries`).
        prompts: of steps with prompts, by tokens and batch size.
        adapted: of decode steps in which a token has an adapter, by batch size. Such steps of several tokens a sequence
            run eagerly.
    """

    input_type = CudaModelInput

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        self.ops: CudaOps
        self.attention: CudaAttention
        engine, alike = config.engine, config.engine.batch_invariant
        super().__init__(config, device, communicator, attention=InvariantAttention if alike else CudaAttention,
                         ops=InvariantOps() if alike else CudaOps(), sampler=CudaSampler(alike))
        if engine.kv_dtype == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
            raise BackendError(f"{torch.cuda.get_device_name(device)} has no fp8", got="kv_dtype=fp8",
                               expected="kv_dtype=auto", hint="fp8 needs compute capability 8.9 or more")
        self.plan = ShapePlan({})
        self.graphs: dict[int, StepGraph] = {}
        self.several: dict[tuple[int, int], StepGraph] = {}
        self.adapted: dict[int, StepGraph] = {}
        self.prompts: dict[tuple[int, int], StepGraph] = {}
        # The results of `several` and of `prompts`, since one graph is replayed at a time.
        self._logits = torch.empty(0, device=device)
        self._graph_at: list[StepGraph] = []  # for each number of sequences the graph that holds them
        self.width = -(-config.max_model_len // engine.block_size)
        self.pinned = PinnedRing(1 << 20)
        self._fetch = Fetcher()
        self._views: dict[tuple[int, int, int, bool], tuple[Any, dict[str, torch.Tensor]]] = {}  # of a graph's input

    def load_model(self, progress: Progress = no_progress) -> None:
        with _memory("the model's weights", "a smaller model or dtype, or more ranks (tp, pp)"):
            super().load_model(progress)
        self.attention.expect(max(self.queries, default=0))
        engine = self.config.engine
        # Graph inputs have no state_rows, layers with states need not be capturable, and graphs give no taps.
        if self.communicator.capturable and engine.graphs and not (self.has_row_states or self.taps):
            # A round of drafts has graphs of its own, and graphs of prompts have not the kernels of batch_invariant.
            prompts = () if self.queries or engine.batch_invariant else prompt_sizes(
                self.config.model.num_active_params / (self.config.model.num_layers * self.config.topology.tp),
                engine.max_num_batched_tokens)
            self.plan = graph_plan(engine.max_num_seqs, self.queries, prompts)

    @torch.inference_mode()
    def reserve_bytes(self) -> int:
        """Measured: what a step of the most tokens allocates, and what graphs take."""
        engine = self.config.engine
        tokens = min(engine.max_num_batched_tokens, engine.max_num_seqs * self.config.max_model_len)
        queries = min(tokens, self.config.max_model_len)
        seqs = min(max(tokens // queries, 1), engine.max_num_seqs)
        with _memory("a step of max_num_batched_tokens", "a smaller max_num_batched_tokens or max_num_seqs"):
            caches = self.make_kv_caches(1)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.execute_model(self.dummy_input(seqs, queries, self.adapters is not None), caches,
                               self.dummy_intermediate(seqs * queries))
            torch.cuda.synchronize(self.device)
            steps = torch.cuda.max_memory_allocated(self.device) - before
        del caches
        torch.cuda.empty_cache()
        samples = min(engine.max_num_seqs * engine.max_samples, engine.max_num_batched_tokens)
        logits = samples * self.config.model.vocab_size * 16  # sampling in fp32, several copies
        largest = self.plan.kinds.get("prompts", {"num_tokens": (0,)})["num_tokens"][-1]
        graphs = _GRAPH_BYTES + steps * largest // (seqs * queries) if self.plan.kinds else 0
        return steps + logits + graphs

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        with _memory("the KV cache", "a smaller num_blocks or memory_fraction"):
            return super().make_kv_caches(num_blocks)

    @torch.inference_mode()
    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        super().warmup(kv_caches, progress)
        self._views.clear()
        for adapted in (False, True) if self.adapters is not None else (False,):  # chooses kernels of one row
            self.execute_model(self.dummy_input(1, 1, adapted), kv_caches, self.dummy_intermediate(1))
        self.ops.settle()
        self.ops.warm_experts(self.model, self.config.engine.max_num_batched_tokens)
        self.attention.warmup(kv_caches)
        if self.config.topology.samples:
            self._warm_sampler()
        if self.config.engine.steps_per_message != 1 or self.queries:
            self._warm_advance()
        pool = torch.cuda.graph_pool_handle() if self.plan.kinds else None
        # No closure here: after an out-of-memory error the traceback would keep the closure alive, and with it the
        # device memory.
        run = functools.partial(self._captured, kv_caches)
        with _memory("CUDA graphs", "a smaller max_num_seqs or memory_fraction, or graphs=False"):
            for done, bucket in enumerate(self.plan.buckets()):  # the largest first: the others fit into its memory
                progress("capturing graphs", done, len(self.plan))
                sizes = bucket.dims
                n, queries, dims = sizes["num_seqs"], sizes.get("queries", 1), graph_dims(sizes["num_seqs"], self.width)
                if bucket.kind == "decode":
                    self.graphs[n] = self._capture(run, dims, pool)
                    if self.adapters is not None:
                        self.adapted[n] = self._capture(run, dims, pool, adapted=True)
                elif bucket.kind == "several":
                    # A draft needs logits behind one token of each sequence alone.
                    dims = graph_dims(n, self.width, queries, queries if self.config.engine.speculate else 1)
                    self.several[n, queries] = self._capture(run, dims, pool, queries)
                else:
                    self.prompts[sizes["num_tokens"], n] = self._capture(run, {**dims, **sizes}, pool, 0)
                self.compiled += 1
        if self.graphs:
            progress("capturing graphs", len(self.plan), len(self.plan))
            holding = (self.plan.bucket_for("decode", {"num_seqs": n}) for n in range(max(self.graphs) + 1))
            self._graph_at = [self.graphs[bucket.dims["num_seqs"]] for bucket in holding]

        self.rounds = [(n, drafts) for n in sorted({n for n, _ in self.several} & _MEASURED)
                       for drafts in (0, *(q - 1 for q in self.queries))] if self.config.engine.speculate else ()

    def _capture(self, run: Run, dims: Mapping[str, int], pool: Any, queries: int = 1, adapted: bool = False,
                 ) -> StepGraph:
        empty, received = self._empty(dims, queries, adapted), self.dummy_intermediate(dims["num_tokens"])
        return capture(empty, dims, received, run, pool, _ROOM, self.device)

    def _captured(self, kv_caches: Sequence[torch.Tensor], m: PagedModelInput, received: IntermediateTensors | None,
                  ) -> Results:
        """What a graph does. Steps of several tokens a sequence have no pending ones, since an engine that speculates
        waits for each step."""
        last, input_ids = None, m.input_ids
        if m.pending_rows is not None:
            last = self.pending.last
            input_ids = elementwise.resolve(input_ids, m.pending_rows, last)
        hidden = self.model(input_ids, m.positions, self.forward_context(m, kv_caches), received)
        if not isinstance(hidden, torch.Tensor):
            return cast(IntermediateTensors, hidden)
        if m.max_query_len == 1:
            logits = self.model.compute_logits(hidden)
        else:
            logits = self.model.compute_logits(hidden.index_select(0, m.logits_indices))
            if len(self._logits) < len(logits):  # the graphs' pool keeps results apart otherwise
                self._logits = torch.empty_like(logits)
            logits = self._logits[:len(logits)].copy_(logits)
        return logits, greedy(logits, m.sampled_rows, last)  # on every rank, since all have the same logits

    def _warm_advance(self) -> None:
        """Compile what advances a graph's input."""
        m = self._empty(graph_dims(1, self.width)).to(self.device)
        going, counts, out = (torch.zeros(shape, dtype=torch.int32, device=self.device) for shape in (1, 1, (1, 1)))
        stop_ids = torch.zeros(1, STOP_IDS, dtype=torch.int32, device=self.device)
        elementwise.advance(m, counts.clone(), stop_ids, counts.clone(), going, counts, out, 0)

    def _warm_sampler(self) -> None:
        """Compile what a step's sampling may need."""
        m, n = self.dummy_input(1, 1), self.config.model.vocab_size
        one, row = (torch.ones(1, dtype=kind, device=self.device) for kind in (torch.float32, torch.int64))
        for dtype in {self.dtype, torch.float32}:  # the second with penalties
            logits = torch.zeros(1, n, dtype=dtype, device=self.device)
            m.temperature = m.seed = None
            self.sampler(logits, m)
            m.temperature, m.seed = one, row
            for m.top_k, m.top_p in ((None, None), (None, one), (row.int(), None)):
                self.sampler(logits, m)

    def _empty(self, dims: Mapping[str, int], queries: int = 1, adapted: bool = False) -> Packed[Any]:
        """A graph's input in which every sequence is padding: it writes the null block. `queries`: see StepGraph."""
        also = (*(PENDING if queries <= 1 else ()), *(("adapter_slots",) if adapted else ()))
        packed = self.input_type.schema.allocate(
            dims, also, block_size=self.config.engine.block_size, max_query_len=queries,
            num_samples=dims["num_logits"], adapted=int(adapted))
        for name, array in packed.arrays.items():
            array[...] = -1 if name in also else NULL_BLOCK
        return packed

    def stage(self, packed: Packed[PagedModelInput]) -> PagedModelInput:
        graph = self._graph_for(packed.values, packed.dims)
        if graph is not None and packed.buffer.size <= graph.staged.numel():
            staged = graph.staged
        else:
            staged = torch.empty(packed.buffer.size, dtype=torch.uint8, device=self.device)
        self.pinned.copy(packed.buffer, staged)
        if graph is None or staged is not graph.staged:
            return packed.over(staged)
        key = graph.num_seqs, graph.queries, graph.dims["num_tokens"], packed.values["adapted"] > 0
        kept = self._views.get(key)
        if kept is None or kept[0] is not packed.layout:  # otherwise it is as in the step before
            kept = self._views[key] = packed.layout, packed.views(staged)
        return packed.over(staged, kept[1])

    def on_device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        into = torch.empty(values.nbytes, dtype=torch.uint8, device=self.device)
        self.pinned.copy(values.reshape(-1).view(np.uint8), into)
        return into.view(getattr(torch, values.dtype.name)).view(values.shape)

    def prepare_sampling_input(self, sampling: SamplingRequest) -> SamplingInput:
        packed = self.state.prepare_sampling(sampling)
        staged = torch.empty(packed.buffer.size, dtype=torch.uint8, device=self.device)
        self.pinned.copy(packed.buffer, staged)
        return packed.over(staged)

    def _graph_for(self, values: Mapping[str, Any], dims: Mapping[str, int]) -> StepGraph | None:
        """The graph that a step of these sizes runs as, once it is padded; None where the step runs eagerly. Graphs
        run the steps in which every sequence decodes and is sampled, or has a few tokens, and of which nothing else is
        wanted."""
        n, at = dims["num_seqs"], self._graph_at
        max_query_len, adapted = values["max_query_len"], values.get("adapted")
        if max_query_len == 1 and dims["num_logits"] == n < len(at) and not dims["num_targets"]:
            return self.adapted[at[n].num_seqs] if adapted else at[n]
        if dims["num_targets"] or adapted or not (self.several or self.prompts):
            return None
        if self.prompts:
            most = self.plan.kinds["prompts"]
            if not all(0 < dims[name] <= sizes[-1] for name, sizes in most.items()) or dims["num_logits"] > n:
                return None
            sizes = self.plan.bucket_for("prompts", dims).dims
            return self.prompts[sizes["num_tokens"], sizes["num_seqs"]]
        most = self.plan.kinds["several"]
        if not (n <= most["num_seqs"][-1] and 1 < max_query_len <= most["queries"][-1]):
            return None
        sizes = self.plan.bucket_for("several", {"num_seqs": n, "queries": max_query_len}).dims
        graph = self.several[sizes["num_seqs"], sizes["queries"]]
        return graph if all(dims[name] <= graph.dims[name] for name in ("num_tokens", "num_logits")) else None

    def padding(self, dims: Mapping[str, int], values: Mapping[str, Any]) -> tuple[Mapping[str, int], Sequence[str]]:
        """The sizes, and the optional fields, of the graph that a step runs as."""
        graph = self._graph_for(values, dims)
        return ({}, ()) if graph is None else (graph.dims, graph.pending)

    def _runs_as(self, m: PagedModelInput) -> StepGraph | None:
        """The graph that this input runs as; None where it runs eagerly."""
        packed = packed_source(m)
        graph = None if packed is None else self._graph_for(packed.values, packed.dims)
        if packed is None or packed.moved is None or graph is None or not graph.dims.items() <= packed.dims.items():
            return None
        # Pending tokens, or room for them, are in the layout that a graph reads, or are not.
        return graph if (m.pending_rows is not None) == bool(graph.pending) else None

    def _stage(self, m: PagedModelInput, graph: StepGraph) -> None:
        """Bring the input to where its graph reads it."""
        moved = packed_source(m).moved  # type: ignore[union-attr]  # an input that runs as a graph has it
        if moved is not graph.staged:
            graph.staged[:graph.size].copy_(moved[:graph.size])

    def _take_in(self, m: PagedModelInput) -> StepGraph | None:
        """The graph of a decode step, which gets the input: one that was staged, or one that was made on the device."""
        graph, n = self._runs_as(m), len(m.seq_lens)
        if graph is not None:
            self._stage(m, graph)
        elif packed_source(m) is None and m.max_query_len == 1 and m.num_samples == n < len(self._graph_at) and (
                m.adapter_slots is None):
            graph = self._graph_at[n]
            for name in ("input_ids", "positions", "slot_mapping", "seq_lens"):
                graph.input[name][:n].copy_(m[name])
                graph.input[name][n:].zero_()  # padding writes the null block
            width = min(m.block_tables.shape[1], self.width)
            graph.input.block_tables[:n, :width].copy_(m.block_tables[:, :width])
        return graph

    def forward(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                intermediate: IntermediateTensors | None) -> Forwarded | IntermediateTensors:
        graph = self._runs_as(m)
        if graph is None:
            with _memory("this step", "a smaller max_num_batched_tokens or memory_fraction"):
                return super().forward(m, kv_caches, intermediate)
        self._stage(m, graph)
        if graph.received is not None and intermediate is not None:
            for name in self.model.intermediates:
                graph.received[name].copy_(intermediate[name])
        graph.graph.replay()
        if isinstance(graph.results, IntermediateTensors):
            return graph.results  # the stream waits until they are sent, so no replay overwrites them before
        logits, token_ids = graph.results
        return Forwarded(logits[:m.num_samples], None, token_ids[:m.num_samples])

    def execute_steps(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> SamplerOutput | None:
        """Replays of one graph. Between them the device samples and advances the graph's input, without the host."""
        graph = None if m.stop_ids is None else self._take_in(m)
        if graph is None:
            return super().execute_steps(m, kv_caches)
        m, n, steps, rows = copy.copy(m), m.num_samples, m.num_steps, len(m.seq_lens)
        for name in _ADVANCED:  # what sampling reads of them advances too
            setattr(m, name, graph.input[name][:rows])
        others = [f for f in type(m).schema.fields if f.array and f.name not in _ADVANCED and f.advance is not stays
                  and m[f.name] is not None and f.name not in ("query_start_loc", "logits_indices")]
        drawn = m.temperature is not None or bool(adjusting(m))
        logits, greedy_ids = cast(tuple[torch.Tensor, torch.Tensor], graph.results)
        going = torch.ones(n, dtype=torch.int32, device=self.device)
        counts, out = torch.zeros_like(going), going.new_empty(n, steps)
        outputs = list[SamplerOutput | None]()
        for place in range(steps):
            graph.graph.replay()
            token_ids: torch.Tensor | None = greedy_ids[:n]
            if drawn or m.num_logprobs >= 0:
                outputs.append(self.sample(Forwarded(logits[:n], None, token_ids), m))
                token_ids = self.pending.taken if drawn else token_ids
            assert token_ids is not None
            taken = Taken(F.pad(token_ids, (0, len(m.seq_lens) - n)), m.seq_lens > 0) if others else None
            for field in others:
                assert field.advance is not None
                setattr(m, field.name, field.advance(m[field.name], m, taken))
            elementwise.advance(graph.input, token_ids, m.stop_ids, m.max_new, going, counts, out, place)
        if not self.config.topology.samples:
            return None
        return joined(outputs, counts) or SamplerOutput(token_ids=out.view(-1), counts=counts, num_computed=counts - 1)

    def sample(self, forwarded: Forwarded, m: PagedModelInput) -> SamplerOutput | None:
        if forwarded.token_ids is None or m.temperature is not None or adjusting(m):
            with _memory("this step's sampling", "a smaller max_num_seqs or memory_fraction"):
                return super().sample(forwarded, m)
        if m.num_logprobs >= 0:
            output = self.draw(forwarded.logits, m)
        else:  # a decode step's graph has kept these tokens as the rows' last ones, too
            output = SamplerOutput(token_ids=forwarded.token_ids) if self.config.topology.samples else None
        return output if output is None or m.sample_counts is None else self.verify(output, m)

    def draw(self, logits: torch.Tensor, m: PagedModelInput) -> SamplerOutput | None:
        with _memory("this step's sampling", "a smaller max_num_seqs or memory_fraction"):
            return super().draw(logits, m)

    def fetch(self, output: OutputT) -> Callable[[], OutputT]:
        return self._fetch(output)

    def capture_report(self) -> str:
        """The cost of the graphs, as a table."""
        rows, graphs = [f"{'batch':>6} {'tokens':>6} {'seconds':>8} {'MiB':>7}"], [
            *self.graphs.values(), *self.several.values(), *self.adapted.values(), *self.prompts.values()]
        rows += [f"{g.num_seqs:>6} {g.dims['num_tokens']:>6} {g.seconds:8.2f} {g.bytes / 2**20:7.1f}"
                 for g in sorted(graphs, key=lambda g: (g.dims["num_tokens"], g.num_seqs))]
        total = sum(g.seconds for g in graphs), sum(g.bytes for g in graphs) / 2**20
        return "\n".join([*rows, f"{'all':>13} {total[0]:8.2f} {total[1]:7.1f}"])


class _memory:
    """Names what did not fit when the device is out of memory, and gives back what can be given back."""

    def __init__(self, what: str, hint: str) -> None:
        self.what, self.hint = what, hint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        # PyTorch's allocator says so, and the driver and cuBLAS, which allocate past it; a capture may fail on top.
        texts = str(error), str(error.__context__)
        said = [text for text in texts if "out of memory" in text or "ALLOC_FAILED" in text]
        if said:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            got = ". ".join(said[0].splitlines()[0].split(". ")[:2])  # without the allocator's advice
            raise CapacityError(f"device memory cannot hold {self.what}", got=got,
                                expected=f"to fit into {free / 2**30:.1f} of {total / 2**30:.1f} GiB that are free",
                                hint=self.hint) from error
