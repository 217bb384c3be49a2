"""Runners that give a sequence several tokens in one step, and the one-token runners whose texts they must give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.sampling.sampler import logprobs
from hal.testing.null import NullBackend, NullRunner

WIDTH = 4


def follows(token: torch.Tensor, vocab: int) -> torch.Tensor:
    """The token that comes after this one, whatever was before; -1 where the context decides."""
    return torch.where(token % 3 != 2, (token * 5 + 1) % vocab, -1)


class OneToken(NullRunner):
    """The null runner, in whose text some tokens have only one successor."""

    def sample(self, sums: torch.Tensor, m: PagedModelInput) -> SamplerOutput:
        forced = follows(m.input_ids[m.logits_indices].long(), self.config.model.vocab_size)
        return super().sample(torch.where(forced >= 0, forced, sums), m)


class Jumping(OneToken):
    """Gives such successors at once, and leaves their keys and values to the next step. It does not look for the end of
    a sequence, and marks a place behind the last token by a token that no text may show."""

    tokens_per_row = WIDTH

    def sample(self, sums: torch.Tensor, m: PagedModelInput) -> SamplerOutput:
        one, vocab = super().sample(sums, m), self.config.model.vocab_size
        tokens = torch.full((m.num_samples, WIDTH), 7, dtype=torch.int32)
        tokens[:, 0], counts = one.token_ids, torch.ones(m.num_samples, dtype=torch.int32)
        for place in range(1, WIDTH):
            forced = follows(tokens[:, place - 1].long(), vocab)
            more = (counts == place) & (forced >= 0)
            tokens[more, place] = forced[more].int()
            counts += more
        if not (counts > 1).any():
            return one
        one.token_ids, one.counts = tokens.view(-1), counts
        if m.num_logprobs >= 0:
            places = tokens.long()
            places[:, 0] = torch.where((first := follows(m.input_ids[m.logits_indices[:m.num_samples]].long(), vocab))
                                       >= 0, first, sums[:m.num_samples])
            raw = (torch.arange(vocab) - places.view(-1, 1)).remainder(vocab) / -4.0
            for name, value in logprobs(raw, one.token_ids, m.num_logprobs).fields().items():
                setattr(one, name, value)
        return one


class Stepping(NullRunner):
    """Takes further decode steps within one step, as long as a sequence has slots in its last block. What it computes
    is in the cache, so that the next step has one token to compute."""

    tokens_per_row = WIDTH

    def execute_model(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                      intermediate: Any = None) -> Any:
        m, topology = model_input, self.config.topology
        output = super().execute_model(m, kv_caches, intermediate)
        n = m.num_samples
        tokens = torch.zeros(n, WIDTH, dtype=torch.int32)
        if topology.samples:
            tokens[:, 0] = output.token_ids
        seqs = torch.searchsorted(m.query_start_loc, m.logits_indices[:n], right=True) - 1
        lens, tables = m.seq_lens[seqs], m.block_tables[seqs]
        extra = (-lens % m.block_size).clamp(max=WIDTH - 1)
        for place in range(1, WIDTH):
            tokens[:, place - 1] = self.communicator.all_reduce(tokens[:, place - 1].contiguous())
            rows = (extra >= place).nonzero()[:, 0]
            if not len(rows):
                break
            at, count = lens[rows] + place - 1, len(rows)
            starts = torch.arange(count + 1, dtype=torch.int32)
            step = PagedModelInput(
                input_ids=tokens[rows, place - 1], positions=at, query_start_loc=starts, seq_lens=at + 1,
                slot_mapping=tables[rows, at // m.block_size] * m.block_size + at % m.block_size,
                block_tables=tables[rows], logits_indices=starts[:-1], block_size=m.block_size, num_decode_seqs=count,
                max_query_len=1, num_samples=count)
            found = super().execute_model(step, kv_caches)
            if topology.samples:
                tokens[rows, place] = found.token_ids
        if not topology.samples:
            return output
        output.token_ids, output.counts, output.num_computed = tokens.view(-1), extra + 1, extra
        return output


class Several(NullBackend):
    name, runner = "several", NullRunner

    def make_runner(self, *args: Any) -> Any:
        return self.runner(*args)


def of(kind: type[NullRunner]) -> Several:
    made = Several()
    made.runner = kind
    return made


one, jumping, stepping = map(of, (OneToken, Jumping, Stepping))
