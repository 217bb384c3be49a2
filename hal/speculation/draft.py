"""Proposals of a smaller model, the draft, which runs on ranks of the target behind the target's sampler.

The draft's keys and values lie in blocks of the target's ids, so the two caches are allocated, shared and moved
together. In every step the draft computes the tokens that the target computed, and the new token behind them. Its cache
is then complete wherever the target's is, whatever was accepted, preempted or found in the prefix cache. Further tokens
are computed one at a time. The draft samples with the parameters and the noise of the request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from hal.checkpoints.draft import read_draft
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts.advance import Taken
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.inputs import NULL_BLOCK, IntermediateTensors, PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.proposer import RankProposer
from hal.contracts.runner import Progress, no_progress
from hal.errors import ConfigError
from hal.features import FEATURES
from hal.features.stopping import STOP_IDS
from hal.model_config import ModelConfig
from hal.models import check_topology
from hal.paged.runner import Forwarded, PagedModelRunner
from hal.schema.packed import on_host

_CARRIED = [name for f in FEATURES if not f.per_step for name, array in f.fields.items()
            if array.dims[0].symbol == "num_sampled"]  # a mask holds for its own place alone


class Rows(NamedTuple):
    """The sampled rows of a step, without padding.

    Attributes:
        seqs, counts: of each its sequence, and its places to sample. [n], on the host.
        gained, tokens: int32 [n], on the device: how many tokens it gained, and the last of them.
        padding: rows of padding behind them.
    """

    seqs: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]
    gained: torch.Tensor
    tokens: torch.Tensor
    padding: int


class Known(NamedTuple):
    """Of each sampled row, int32 [n] on the device, what the host knows before the step has sampled.

    Attributes:
        firsts: the first new token, in the step of the draft. places: the first place, among the places to sample.
        lens: the context length before its places. seqs: its sequence.
    """

    firsts: torch.Tensor
    places: torch.Tensor
    lens: torch.Tensor
    seqs: torch.Tensor


class DraftProposer(RankProposer):
    """Attributes:
        behind: how many places before a token the model reads it. A model reads a token at its own place.
        runs: whether this rank computes. With draft_tp = tp every rank has its part of the draft. With draft_tp = 1
            only the rank that samples has the draft, since no other rank needs its tokens: nothing is communicated.
        runner: of the draft, on the ranks that compute.
    """

    kind: Literal["draft", "eagle"] = "draft"
    behind = 0
    cost = 0.15  # of a draft with a tenth of the target's weights, in a step that also has fixed costs

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Any, target: Any) -> None:
        super().__init__(config, device, communicator, target)
        engine, topology = config.engine, config.topology
        model, directory = self.check(engine, config.model), engine.draft_model or ""
        if not isinstance(target, PagedModelRunner):
            raise ConfigError("a draft model runs beside a runner of paged sequences alone",
                              got=f"speculate={engine.speculate!r} with {type(target).__name__}",
                              expected="a hal.paged.runner.PagedModelRunner", hint='speculate="ngram"')
        self.runs = engine.draft_tp == topology.tp or topology.samples
        own = dataclasses.replace(engine, model=directory, speculate=None, draft_model=None, draft_tp=1, pp=1,
                                  ep=1, max_adapters=0, tp=engine.draft_tp, max_model_len=config.max_model_len)
        place = Topology(engine.draft_tp, 1, topology.tp_rank if engine.draft_tp > 1 else 0)
        among = communicator if engine.draft_tp > 1 else LocalCommunicator()
        self.runner: PagedModelRunner = type(target)(WorkerConfig(own, model, place), device, among)
        self.runner.make_attention, self.runner.sampler = target.make_attention, target.sampler
        self.runner.queries = tuple(sorted({2, *(n + 1 - self.behind for n in target.queries)}))
        self.scratch = -(-engine.speculative_tokens // engine.block_size) + 1  # blocks of a row, see `_tables`
        self.num_blocks = 0

    @classmethod
    def check(cls, engine: EngineConfig, target: ModelConfig) -> ModelConfig:
        """The draft's shape.

        Raises:
            ConfigError: the draft does not fit the target, or draft_tp does not fit the draft or tp. ModelLoadError.
        """
        assert engine.draft_model is not None
        model = read_draft(engine.draft_model, cls.kind, target, engine.longest_sequence(target),
                           weights=not engine.random_weights)
        if engine.draft_tp not in (1, engine.tp):
            raise ConfigError("the draft runs on one rank, or on all tensor-parallel ranks of the target",
                              got=f"draft_tp={engine.draft_tp}, tp={engine.tp}", expected=f"1 or {engine.tp}")
        try:
            check_topology(model, Topology(tp=engine.draft_tp))
        except ConfigError as error:
            raise ConfigError("the draft model cannot be sharded over draft_tp ranks", got=str(error),
                              expected="draft_tp=1, or a degree that divides the draft") from error
        return model

    def load_model(self, progress: Progress = no_progress) -> None:
        if self.runs:
            self.runner.load_model(progress)
            if self.runner.has_row_states:
                raise ConfigError("a state per row cannot be taken back when a draft is rejected",
                                  got=f"a draft whose layers keep such states: {self.config.engine.draft_model}",
                                  expected="a draft of paged caches alone")

    def kv_bytes_per_block(self) -> int:
        return self.runner.kv_bytes_per_block() if self.runs else 0

    def reserve_bytes(self) -> int:
        if not self.runs:
            return 0
        scratch = self.scratch * self.config.engine.max_num_seqs * self.kv_bytes_per_block()
        return self.reserve_step() + scratch

    def reserve_step(self) -> int:
        return self.runner.reserve_bytes()

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        self.num_blocks = num_blocks
        if not self.runs:
            return ()
        return self.runner.make_kv_caches(num_blocks + self.scratch * self.config.engine.max_num_seqs)

    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        if self.runs:
            self.runner.warmup(kv_caches, progress)

    @torch.inference_mode()
    def propose(self, m: PagedModelInput, output: SamplerOutput, forwarded: Any, kv_caches: Sequence[torch.Tensor],
                ) -> torch.Tensor | None:
        if not self.runs:
            return None
        rows = self._rows(m, output)
        step, known = self._whole(m, rows)
        found = self.runner.forward(step, kv_caches, self.given(m, forwarded))
        assert isinstance(found, Forwarded)
        if not m.num_proposals or not len(rows.seqs):
            return None
        limit, step = self.config.max_model_len, self._before(m, rows, known, step.block_tables)
        before, step = step, step.advance(Taken(rows.tokens, step.seq_lens < limit))
        tokens = self.runner.sampler(found.logits, step).token_ids.clamp(min=0)
        first = tokens.where(step.seq_lens < limit, -1)[:, None]
        more = first[:, :0] if m.num_proposals == 1 else self.further(before, step, tokens, found.hidden,
                                                                      m.num_proposals - 1, kv_caches)
        if more is None or not self.config.topology.samples:
            return None
        return F.pad(torch.cat((first, more), 1), (0, 0, 0, rows.padding), value=-1)

    def given(self, m: PagedModelInput, forwarded: Forwarded) -> IntermediateTensors | None:
        """What the draft reads of the target's forward pass; None: nothing."""
        return None

    def further(self, before: PagedModelInput, step: PagedModelInput, tokens: torch.Tensor,
                hidden: torch.Tensor | None, count: int, kv_caches: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The next `count` proposals, int32 [n, count], one decode step each; -1 behind the last that fits into the
        context. None on ranks that do not sample.

        Args:
            before, step: inputs of one token a row: `step` holds the last known one, and `before` is the one before.
            tokens: int32 [n], the proposals behind `step`. hidden: the hidden states that they come from.
        """
        n, limit = len(tokens), self.config.max_model_len
        step = step.advance(Taken(tokens, step.seq_lens < limit))
        step.num_steps, step.max_new = count, limit - step.seq_lens
        step.stop_ids = torch.full((n, STOP_IDS), -1, dtype=torch.int32, device=self.device)
        output = self.runner.execute_steps(step, kv_caches)
        if output is None:
            return None
        assert output.counts is not None
        proposed = output.token_ids.view(n, -1)  # on a CPU fewer, where all sequences have ended
        inside = torch.arange(proposed.shape[1], device=self.device) < step.max_new.minimum(output.counts)[:, None]
        return F.pad(proposed.where(inside, -1), (0, count - proposed.shape[1]), value=-1)

    def _rows(self, m: PagedModelInput, output: SamplerOutput) -> Rows:
        counts = np.ones(m.num_samples, np.int64)
        if m.sample_counts is not None:
            counts = on_host(m, "sample_counts").astype(np.int64)
        n = int(np.count_nonzero(counts))
        ends = on_host(m, "logits_indices")[np.cumsum(counts[:n]) - 1]
        seqs = np.searchsorted(on_host(m, "query_start_loc"), ends, side="right") - 1
        tokens = output.token_ids.view(len(counts), 1 if output.counts is None else m.max_samples)
        gained = torch.ones_like(tokens[:, 0]) if output.counts is None else output.counts
        last = tokens.gather(1, (gained - 1)[:, None].long())[:, 0].clamp(min=0)
        return Rows(seqs, counts[:n], gained[:n], last[:n], len(counts) - n)

    def _whole(self, m: PagedModelInput, rows: Rows) -> tuple[PagedModelInput, Known]:
        """The step in which the draft computes what the target computed, with logits behind each row's last token. A
        sampled sequence has one token more than in `m`. What lies behind its last token is junk: it writes slots that
        no token has yet, and no earlier token attends to it. The host prepares it while the target computes."""
        size, starts, lens = m.block_size, on_host(m, "query_start_loc"), on_host(m, "seq_lens").astype(np.int64)
        computed, extra = np.diff(starts), np.zeros(len(lens), np.int64)
        extra[rows.seqs] = 1 - self.behind
        queries = computed + extra
        begin = np.concatenate(([0], np.cumsum(queries)))
        seq_of = np.repeat(np.arange(len(lens)), queries)
        within = np.arange(begin[-1]) - begin[seq_of]
        positions = np.minimum((lens - computed)[seq_of] + within, self.config.max_model_len - 1)
        tables, at = self._tables(m, rows, lens), rows.seqs
        wanted = len(at) if m.num_proposals else 0
        dims = {"num_tokens": len(positions), "num_seqs": len(lens), "num_logits": wanted,
                "max_blocks": tables.shape[1], "num_targets": 0}
        values = {"block_size": size, "max_query_len": int(queries.max(initial=0)), "num_samples": wanted}
        larger, also = self.runner.padding(dims, values)
        packed = type(m).schema.allocate({**dims, **larger}, also, **values)
        source = np.minimum(starts[seq_of] + within + self.behind, starts[seq_of + 1] - 1)
        fields = {"input_ids": source, "positions": positions, "query_start_loc": begin, "seq_lens": lens + extra,
                  "block_tables": tables, "slot_mapping": tables[seq_of, positions // size] * size + positions % size}
        for name in packed.arrays:
            packed.fill(name, fields.get(name))
        step: PagedModelInput = self.runner.stage(packed)
        known = Known(*self.runner.on_device(np.stack((
            begin[at] + computed[at] - rows.counts - self.behind, np.cumsum(rows.counts) - rows.counts,
            lens[at] - rows.counts, at)).astype(np.int32)))
        places = (known.firsts + rows.gained).long()
        ids = self.target.pending.input_ids(m)[step.input_ids.long()]
        step.input_ids.copy_(ids.index_copy_(0, places, rows.tokens))  # in place: a graph may read them there
        if wanted:
            step.logits_indices[:wanted].copy_(places)
        return step, known

    def _tables(self, m: PagedModelInput, rows: Rows, lens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Block tables that reach to the last proposal. Where a row has no block yet, a block behind the scheduler's,
        which no other row uses, takes its place until the tokens are accepted and computed again."""
        tables, size = on_host(m, "block_tables"), m.block_size
        tables = np.pad(tables, ((0, 0), (0, self.scratch)), constant_values=NULL_BLOCK)
        ahead = np.arange(self.scratch)
        columns = (lens[rows.seqs] // size)[:, None] + ahead
        own = self.num_blocks + np.arange(len(rows.seqs))[:, None] * self.scratch + ahead
        at = rows.seqs[:, None]
        tables[at, columns] = np.where(tables[at, columns] == NULL_BLOCK, own, tables[at, columns])
        return tables[:, :-(-self.config.max_model_len // size)]

    def _before(self, m: PagedModelInput, rows: Rows, known: Known, tables: torch.Tensor) -> PagedModelInput:
        """A step of one token a row, the one before the row's last, with what sampling needs behind that token."""
        n, size, lens = len(rows.seqs), m.block_size, known.lens + rows.gained
        starts = torch.arange(n + 1, dtype=torch.int32, device=self.device)
        chosen = known.places + rows.gained - 1  # of a row's places, that of its last token says what follows
        carried: dict[str, Any] = {name: m[name][chosen] for name in _CARRIED if m[name] is not None}
        nothing = torch.zeros_like(rows.tokens)
        return type(m)(input_ids=nothing, positions=lens - 1, slot_mapping=nothing, query_start_loc=starts,
                       seq_lens=lens, block_tables=tables[known.seqs], logits_indices=starts[:-1],
                       block_size=size, num_decode_seqs=n, max_query_len=1, num_samples=n, **carried)
