"""The TPU's runner of embeddings: all texts of a step have one length, padded to a shape of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import monotonic
from typing import Any

import numpy as np
import torch

from hal.config import WorkerConfig
from hal.contracts.attention import AttentionSpec, ForwardContext
from hal.contracts.communicator import Communicator
from hal.contracts.embedding import EmbeddingInput, EmbeddingOutput
from hal.contracts.inputs import IntermediateTensors
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import Progress, no_progress
from hal.embedding.attention import visible
from hal.embedding.runner import EmbeddingRunner
from hal.models.causal_lm import CausalLM
from hal.paged.shape_plan import Bucket, ShapePlan, ladder
from hal.schema.packed import Packed, on_host
from runners.tpu import lowering
from runners.tpu.inputs import StagedInput, stage
from runners.tpu.plan import budget, by_need
from runners.tpu.spmd import load

_SHORTEST, _GROWTH = 16, 8  # the smallest length; growth of the number of texts from rung to rung
_HIDDEN = -1e30  # finite, so that a row with nothing to see (padding) has no NaN


class TpuEmbeddingInput(StagedInput, EmbeddingInput):
    """Texts of one length. Those that fill the shape have no tokens, and come last."""


class TpuEmbeddingRunner(EmbeddingRunner):
    """Attributes:
        lengths: of the plan, ascending; each is a kind of step. plan: numbers of texts by length.
        programs: by bucket. late: how many of them the warm-up had no time for, and a step has compiled.
    """

    input_type = TpuEmbeddingInput

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator)
        engine = config.engine
        self.mesh = lowering.use_mesh(engine.tp) if engine.tp > 1 else None
        longest = min(config.max_model_len, self.embedding.max_length, engine.max_num_batched_tokens)
        self.lengths = ladder(longest, 2, min(_SHORTEST, longest))
        # As many texts as the engine gives a step whose longest text needs this length.
        most = [min(engine.max_num_seqs, engine.max_num_batched_tokens // (below + 1))
                for below, _ in pairwise((0, *self.lengths))]
        self.plan = ShapePlan({str(length): {"num_seqs": ladder(count, _GROWTH)}
                               for length, count in zip(self.lengths, most, strict=True)})
        self.programs: dict[Bucket, lowering.Program] = {}

    @property
    def compiled(self) -> int:  # type: ignore[override]
        return lowering.compiles()

    @property
    def uncompiled(self) -> int:  # type: ignore[override]
        return len(self.plan) - len(self.programs)

    def make_model(self, progress: Progress = no_progress) -> CausalLM:
        engine, stage_number = self.config.engine, self.config.topology.pp_rank
        return load(engine, self.config.model, stage_number, self.dtype, self.mesh, progress)

    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        if self.config.topology.samples:
            self.finish = self.finish.cpu()  # a few rows, which leave the device in any case

    def warmup(self, kv_caches: Any, progress: Progress = no_progress) -> None:
        """Compile the programs from the smallest on, until the budget is spent."""
        buckets, start, limit = by_need(self.plan, largest_first=False), monotonic(), budget()
        for done, bucket in enumerate(buckets):
            if monotonic() - start >= limit:
                break
            progress("compiling", done, len(buckets))
            self._compile(bucket)
        progress("compiling", len(buckets), len(buckets))
        lowering.wait()

    def prepare_model_input(self, request: ExecuteModelRequest) -> TpuEmbeddingInput:
        self.follow(request)
        made: TpuEmbeddingInput = stage(self.lay_out(request.new_lens, request.new_tokens))
        return made

    def lay_out(self, lens: np.ndarray, tokens: np.ndarray) -> Any:
        """The input of texts of these lengths, padded to its bucket, on the host. Raises CapacityError: none holds it.
        """
        longest = int(lens.max())
        length = next((n for n in self.lengths if n >= longest), self.lengths[-1])
        seqs = self.plan.bucket_for(str(length), {"num_seqs": len(lens)}).dims["num_seqs"]
        packed: Packed[TpuEmbeddingInput] = TpuEmbeddingInput.schema.allocate({"num_tokens": seqs * length,
                                                                               "num_seqs": seqs})
        real = np.arange(length) < np.pad(lens, (0, seqs - len(lens)))[:, None]
        ids = np.zeros(real.shape, np.int32)
        ids[real] = tokens
        packed.arrays["input_ids"][...] = ids.ravel()
        packed.arrays["positions"][...] = np.where(real, np.arange(length), 0).ravel()
        packed.arrays["seq_lens"][...] = real.sum(1)
        packed.arrays["query_start_loc"][...] = np.arange(seqs + 1) * length
        return packed

    def execute_model(self, model_input: EmbeddingInput, kv_caches: Any,
                      intermediate: IntermediateTensors | None = None) -> EmbeddingOutput | IntermediateTensors | None:
        m, (tokens, seqs) = model_input, (model_input.input_ids.shape[0], model_input.seq_lens.shape[0])
        bucket = Bucket(str(tokens // seqs), (("num_seqs", seqs),))
        if bucket not in self.programs:
            before = self.compiled
            self._compile(bucket)
            self.late += self.compiled - before
        arguments = [m.input_ids, m.positions, m.seq_lens]
        if intermediate is not None:
            arguments += [intermediate[name] for name in self.model.intermediates]
        results = self.programs[bucket](arguments)
        if not self.config.topology.is_last_stage:
            return self.model.make_intermediate(*results)
        texts = int(np.count_nonzero(on_host(m, "seq_lens")))
        return EmbeddingOutput(embeddings=self.finish(results[0].cpu()[:texts]).contiguous())

    def _compile(self, bucket: Bucket) -> None:
        seqs, length = bucket.dims["num_seqs"], int(bucket.kind)
        tokens, topology = seqs * length, self.config.topology
        arguments = lowering.to_device([torch.zeros(n, dtype=torch.int32) for n in (tokens, tokens, seqs)])
        if not topology.is_first_stage:
            state = torch.zeros(tokens, self.config.model.hidden_size, dtype=self.dtype)
            arguments += lowering.to_device([state.clone() for _ in self.model.intermediates])

        def step(given: Sequence[torch.Tensor], _: Sequence[torch.Tensor]) -> Any:
            ids, positions, lens, *rest = given
            attention = PaddedTextAttention(self.model.attention_specs, self.config.engine.tp, lens, length,
                                            self.config.model.causal)
            before = self.model.make_intermediate(*rest) if rest else None
            m: Any = None  # no layer of these models reads the step's input
            hidden: Any = self.model(ids, positions, ForwardContext(attention, m), before)
            if not topology.is_last_stage:
                return [], [self._whole(hidden[name]) for name in self.model.intermediates]
            return [], [self._whole(self._pool(hidden.view(seqs, length, -1).float(), lens))]

        self.programs[bucket] = lowering.Program(step, arguments)

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.mesh is None else lowering.shard(tensor, self.mesh, None)

    def _pool(self, hidden: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """[texts, length, hidden_size] fp32 -> [texts, hidden_size], without the padding (see hal.embedding.pooling).
        """
        kind, length = self.embedding.pooling, hidden.shape[1]
        if kind == "cls":
            return hidden[:, 0].clone()
        at = torch.arange(length, dtype=torch.int32, device=hidden.device)
        if kind == "last":
            chosen = (at == (lens - 1).clamp(min=0)[:, None]).unsqueeze(-1)
            return hidden.masked_fill(~chosen, 0).sum(1)
        padding = (at >= lens[:, None]).unsqueeze(-1)
        if kind == "max":
            return hidden.masked_fill(padding, _HIDDEN).amax(1)
        count = lens.clamp(min=1).float().unsqueeze(-1)
        return hidden.masked_fill(padding, 0).sum(1) / (count if kind == "mean" else count.sqrt())


class PaddedTextAttention:
    """One step's attention, traced: texts of one length, of which `lens` [S] says how many tokens count. Shapes below:
    R tensor-parallel shares, S texts, L tokens of each, h heads and k key-value heads of a share, g = h / k, and d is
    head_dim.
    """

    def __init__(self, specs: Sequence[AttentionSpec], ranks: int, lens: torch.Tensor, length: int,
                 causal: bool) -> None:
        self.specs, self.ranks, self.length = specs, ranks, length
        at = torch.arange(length, dtype=torch.int32, device=lens.device)
        real = (at < lens[:, None])[:, None]
        self.hidden = {window: ~(visible(at[:, None] - at, window, causal) & real)[:, None, None]  # [S, 1, 1, L, L]
                       for window in {spec.window for spec in specs}}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [R * S * L, h, d]; k and v [R * S * L, k, d] -> [R * S * L, h * d]."""
        spec = self.specs[layer]
        heads, kv, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        queries = q.reshape(self.ranks, -1, self.length, kv, heads // kv, dim)
        keys, values = (x.reshape(self.ranks, -1, self.length, kv, dim) for x in (k, v))
        scores = torch.einsum("rnqkgd,rnckd->rnkgqc", queries, keys).float() * spec.scale
        weights = scores.masked_fill(self.hidden[spec.window][None], _HIDDEN).softmax(-1).to(q.dtype)
        return torch.einsum("rnkgqc,rnckd->rnqkgd", weights, values).reshape(-1, heads * dim)
