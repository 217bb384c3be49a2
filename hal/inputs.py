"""The typed inputs of a step: what a model runner receives, and what the worker does before it runs."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch

from hal.errors import InputError
from hal.schema import Array, Declared, Doc
from hal.schema.layout import MOST

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seeds", "penalties", "history", "prompt_lens",
                   "sampled_rows")
NULL_BLOCK = 0  # reserved: padding writes its slots, and no sequence ever owns it


class ModelInput(Declared):
    """Base of every runner's input: tensors on the rank's device, declared once."""


class IntermediateTensors(Declared):
    """What one pipeline stage hands to the next; each model makes its own with `IntermediateTensors.declare`."""


class WorkerInput(Declared):
    """What the worker does to the KV cache before a step: int32 pairs (source block, destination block)."""

    virtual_engine: Annotated[int, Doc("which microbatch's KV cache the step uses")] = 0
    blocks_to_copy: Annotated[np.ndarray | None, Array("int32", "num_copies", 2, low=1, doc="device to device")] = None
    blocks_to_swap_in: Annotated[np.ndarray | None, Array("int32", "num_swaps_in", 2, low=0,
                                                          doc="host to device")] = None
    blocks_to_swap_out: Annotated[np.ndarray | None, Array("int32", "num_swaps_out", 2, low=0,
                                                           doc="device to host")] = None


class PagedModelInput(ModelInput):
    """A mixed prefill and decode batch over a paged KV cache. Tokens of a sequence are adjacent; sequences that decode
    (one query token) come first, so that a backend may split the batch at `num_decode_seqs`."""

    input_ids: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, doc="token ids")]
    positions: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, doc="place of each token in its sequence")]
    slot_mapping: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0,
                                                doc="block id * block_size + offset, where the token's KV is written")]
    query_start_loc: Annotated[torch.Tensor, Array("int32", "num_seqs + 1", pad="edge", low=0,
                                                   doc="first token of each sequence, then the number of real tokens")]
    seq_lens: Annotated[torch.Tensor, Array("int32", "num_seqs", low=0, doc="context length with this step's tokens")]
    block_tables: Annotated[torch.Tensor, Array("int32", "num_seqs", "max_blocks", low=0,
                                                doc="block ids in order; the null block behind the last")]
    logits_indices: Annotated[torch.Tensor, Array("int32", "num_logits", low=0, doc="tokens whose logits are needed: "
                                                  "first those to sample after, in the order of their sequences, then "
                                                  "those whose next prompt token's logprob was asked for")]
    # Asynchronous scheduling (see hal.relay).
    relay: Annotated[torch.Tensor | None, Array("int32", "num_tokens", low=-1, pad=-1, doc="row whose last sampled "
                                                "token is this one, not yet known on the host; else -1")] = None
    sampled_rows: Annotated[torch.Tensor | None, Array("int32", "num_sampled", low=-1, pad=-1,
                                                       doc="row of each sampled sequence")] = None
    block_size: Annotated[int, Doc("tokens per block")]
    num_decode_seqs: Annotated[int, Doc("leading sequences with exactly one query token")] = 0
    max_query_len: Annotated[int, Doc("most query tokens of a sequence; at 1 padding decodes too; 0: unknown")] = 0
    num_samples: Annotated[int, Doc("leading rows of logits_indices to sample")] = 0

    # Sampling, absent where no sampled sequence needs it; greedy where temperature is absent or 0.
    temperature: Annotated[torch.Tensor | None, Array("float32", "num_sampled", low=0.0)] = None
    top_k: Annotated[torch.Tensor | None, Array("int32", "num_sampled", low=0, doc="0 keeps all")] = None
    top_p: Annotated[torch.Tensor | None, Array("float32", "num_sampled", low=0.0, high=1.0, pad=1.0)] = None
    min_p: Annotated[torch.Tensor | None, Array("float32", "num_sampled", low=0.0, high=1.0)] = None
    seeds: Annotated[torch.Tensor | None, Array("int64", "num_sampled", doc="of the request; the position is the "
                                                "other half of the random counter")] = None
    penalties: Annotated[torch.Tensor | None, Array("float32", "num_sampled", 3, doc="repetition (1 is none), "
                                                    "presence, frequency (0 is none)")] = None
    history: Annotated[torch.Tensor | None, Array("int32", "num_sampled", "max_history", low=-1, pad=-1,
                                                  doc="all tokens of the sequence so far, for the penalties; -1 behind "
                                                  "the last")] = None
    prompt_lens: Annotated[torch.Tensor | None, Array("int32", "num_sampled", low=0, doc="how many of `history` are "
                                                      "the prompt")] = None
    prompt_targets: Annotated[torch.Tensor | None, Array("int32", "num_targets", low=0, doc="the token whose logprob "
                                                         "is wanted, for the rows behind the sampled ones")] = None
    num_logprobs: Annotated[int, Doc("most likely tokens to report beside each sampled one; -1: no logprobs")] = -1
    num_prompt_logprobs: Annotated[int, Doc("the same for prompt tokens")] = -1

    def check(self) -> None:
        """Semantic check (HAL_STRICT=1): the tensors describe one consistent batch.

        Raises:
            InputError: query_start_loc is not a partition, positions or slots do not follow from seq_lens and
                block_tables, a live slot is written twice or by padding, or an index points outside the batch.
        """
        super().check()
        # In int64, so that no difference or product of values from a message wraps around.
        starts, lens = (x.cpu().numpy().astype(np.int64) for x in (self.query_start_loc, self.seq_lens))
        queries = np.diff(starts)
        if starts[0] != 0 or (queries < 0).any():
            self._refuse("query_start_loc", starts, "0, then never decreasing")
        real = int(starts[-1])
        if real > self.input_ids.shape[0]:
            self._refuse("query_start_loc", real, f"at most num_tokens ({self.input_ids.shape[0]})")
        if (lens < queries).any():
            self._refuse("seq_lens", lens, f"at least the query lengths {queries}")
        decodes = self.num_decode_seqs
        if not 0 <= decodes <= len(queries) or (queries[:decodes] != 1).any():
            self._refuse("num_decode_seqs", decodes, f"leading sequences of one query token, of queries {queries}")
        longest = queries.max(initial=0)
        if self.max_query_len not in (0, longest):
            self._refuse("max_query_len", self.max_query_len, f"{longest}, or 0 where it is not known")
        seq = np.repeat(np.arange(len(queries)), queries)
        expected = np.arange(real) - starts[seq] + (lens - queries)[seq]
        positions = self.positions.cpu().numpy()[:real]
        if (positions != expected).any():
            self._refuse("positions", positions, expected)
        self._check_slots(seq, expected, lens)
        self._check_sampling()
        rows = self.logits_indices.cpu().numpy()
        if rows.size and rows.max() >= max(real, 1):
            self._refuse("logits_indices", rows.max(), f"below the number of real tokens ({real})")

    def _check_slots(self, seq: np.ndarray, positions: np.ndarray, lens: np.ndarray) -> None:
        size = self.block_size
        if not 1 <= size <= MOST:
            self._refuse("block_size", size, f"1 to {MOST}")
        if not len(lens):
            return self._check_padding(0)  # block_tables is empty, however many columns it claims
        tables = self.block_tables.cpu().numpy().astype(np.int64)
        needed = -(-lens // size)
        if (needed > tables.shape[1]).any():
            self._refuse("block_tables", f"{tables.shape[1]} columns", f"{needed.max()} for the longest sequence")
        owned = np.arange(tables.shape[1]) < needed[:, None]
        if (tables[owned] == NULL_BLOCK).any():
            self._refuse("block_tables", "the null block inside a context", "blocks of the sequence's own")
        slots, real = self.slot_mapping.cpu().numpy(), len(seq)
        expected = tables[seq, positions // size] * size + positions % size
        if (slots[:real] != expected).any():
            self._refuse("slot_mapping", slots[:real], expected)
        if len(np.unique(slots[:real])) != real:
            # Right for each sequence by itself, so two sequences' tables name the same block where they write.
            self._refuse("block_tables", "two tokens of this step write the same slot", "each slot written once")
        self._check_padding(real)

    def _check_padding(self, real: int) -> None:
        slots = self.slot_mapping.cpu().numpy()[real:]
        if (slots >= self.block_size).any():
            self._refuse("slot_mapping", slots, "padding inside the null block")

    def _check_sampling(self) -> None:
        targets = 0 if self.prompt_targets is None else self.prompt_targets.shape[0]
        room = self.logits_indices.shape[0] - targets
        if not 0 <= self.num_samples <= room:
            self._refuse("num_samples", self.num_samples, f"0 to {room}, the rows of logits_indices without a target")
        for name in SAMPLING_FIELDS:
            if self[name] is not None and self[name].shape[0] < self.num_samples:
                self._refuse(name, f"{self[name].shape[0]} rows", f"at least num_samples ({self.num_samples})")
        if (self.temperature is None) != (self.seeds is None):
            self._refuse("seeds", "only one of temperature and seeds", "both or none")
        if (self.penalties is None) != (self.history is None) or (self.history is None) != (self.prompt_lens is None):
            self._refuse("penalties", "some of penalties, history, prompt_lens", "all of them or none")

    def _refuse(self, field: str, got: object, expected: object) -> None:
        raise InputError(f"{type(self).__name__}.{field} is inconsistent", got=got, expected=expected, fields=(field,))
