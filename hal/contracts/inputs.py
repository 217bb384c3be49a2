"""The typed inputs of a step: the input of the model runner, and the block moves that the worker does before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import torch

from hal.contracts import advance as rules
from hal.contracts.advance import Taken
from hal.errors import InputError, SchemaError
from hal.features import FEATURES, FOR_SAMPLING, input_annotations
from hal.features.adapter import LOADS
from hal.schema import Array, Declared, Doc, stays
from hal.schema.layout import MOST

NULL_BLOCK = 0  # reserved: padding writes its slots, and it never belongs to a sequence
Self = TypeVar("Self", bound="ModelInput")


class SamplingInput(Declared, fields=input_annotations(FOR_SAMPLING)):
    """The second input of a step in two phases, which comes after its forward pass has begun: the fields of the
    features that declare `for_sampling`. A field that no sequence needs is absent."""


class ModelInput(Declared):
    """Base of every runner's input: tensors on the rank's device, declared once."""

    def join(self, sampling: SamplingInput) -> None:
        """Take the fields that arrived after the forward pass had begun. Then this equals the input of a step in one
        phase.

        Raises:
            InputError: this input has no such field.
        """
        own = type(self).schema.by_name
        for field in SamplingInput.schema.fields:
            value = sampling[field.name]
            if value is None:
                continue
            if field.name not in own:
                raise InputError(f"{type(self).__name__} has no field for what sampling got", got=field.name,
                                 expected="an input with the fields of the step features", fields=(field.name,))
            setattr(self, field.name, value)

    def advance(self: Self, taken: Taken) -> Self:
        """The input of the next decode step, made on this input's device from this input and from what its step gave:
        each field by the rule that it declares (`Array.advance`). Nothing waits for the device, and this input stays as
        it is; a rule that changes nothing shares the tensor with it.

        Raises:
            SchemaError: a field that is present declares no rule. StateError: a rule needs the host.
        """
        made = type(self).__new__(type(self))
        for field in type(self).schema.fields:
            value = self.__dict__[field.name]
            if value is not None and field.advance is not None:
                value = field.advance(value, self, taken)
            elif value is not None:
                type(self).require_advance()
            made.__dict__[field.name] = value
        return made

    @classmethod
    def require_advance(cls) -> None:
        """Raises SchemaError: a field declares no rule by which `advance` makes it."""
        missing = [field.name for field in cls.schema.fields if field.advance is None]
        if missing:
            raise SchemaError(f"{cls.__name__} cannot be advanced to the next decode step",
                              got=f"no rule for {', '.join(missing)}", expected="a rule for each array",
                              hint='declare it beside dtype and shape: Array(..., advance=hal.schema.stays) where the '
                                   "next step has the same values; or take one step a message (steps_per_message=1)")


class IntermediateTensors(Declared):
    """The tensors that a pipeline stage sends to the next one. Each model declares its own class with
    `IntermediateTensors.declare`."""


class WorkerInput(Declared, fields=LOADS):
    """What the worker does before a step. To the KV cache: int32 pairs (source block, destination block), and where
    layers keep a state per row (row, row on the host) or the other way round. To the adapters: slots to fill."""

    sampling_follows: Annotated[bool, Doc("a SamplingInput completes the step")] = False
    blocks_to_copy: Annotated[np.ndarray | None, Array("int32", "num_copies", 2, low=1, doc="device to device")] = None
    blocks_to_swap_in: Annotated[np.ndarray | None, Array("int32", "num_swaps_in", 2, low=0,
                                                          doc="host to device")] = None
    blocks_to_swap_out: Annotated[np.ndarray | None, Array("int32", "num_swaps_out", 2, low=0,
                                                           doc="device to host")] = None
    rows_to_swap_in: Annotated[np.ndarray | None, Array("int32", "num_rows_in", 2, low=0,
                                                        doc="states, host to device")] = None
    rows_to_swap_out: Annotated[np.ndarray | None, Array("int32", "num_rows_out", 2, low=0,
                                                         doc="states, device to host")] = None


class PagedModelInput(ModelInput, fields=input_annotations()):
    """A mixed prefill and decode batch over a paged KV cache. Tokens of a sequence are adjacent; sequences that decode
    (one query token) come first, so that a backend may split the batch at `num_decode_seqs`. The features of
    hal.features add fields for the sampled sequences. A field that no sequence needs is absent."""

    input_ids: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, doc="token ids", advance=rules.input_ids)]
    positions: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, doc="place of each token in its sequence",
                                             advance=rules.positions)]
    slot_mapping: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, advance=rules.slot_mapping,
                                                doc="block id * block_size + offset, where the token's KV is written")]
    query_start_loc: Annotated[torch.Tensor, Array("int32", "num_seqs + 1", pad="edge", low=0,
                                                   doc="first token of each sequence, then the number of real tokens",
                                                   advance=rules.query_start_loc)]
    seq_lens: Annotated[torch.Tensor, Array("int32", "num_seqs", low=0, doc="context length with this step's tokens",
                                            advance=rules.seq_lens)]
    block_tables: Annotated[torch.Tensor, Array("int32", "num_seqs", "max_blocks", low=0, advance=stays,
                                                doc="block ids in order; the null block behind the last")]
    logits_indices: Annotated[torch.Tensor, Array("int32", "num_logits", low=0, advance=rules.logits_indices,
                                                  doc="tokens whose logits are needed: first those to sample after, in "
                                                  "the order of their sequences, then those whose next prompt token's "
                                                  "logprob was asked for")]
    block_size: Annotated[int, Doc("tokens per block")]
    num_decode_seqs: Annotated[int, Doc("leading sequences with exactly one query token",
                                        advance=lambda value, m, taken: m.num_samples)] = 0
    max_query_len: Annotated[int, Doc("most query tokens of a sequence; at 1 padding decodes too; 0: unknown",
                                      advance=lambda value, m, taken: 1)] = 0
    num_samples: Annotated[int, Doc("leading rows of logits_indices to sample")] = 0
    num_steps: Annotated[int, Doc("decode steps that the runner takes, for which the block tables have slots")] = 1
    state_rows: Annotated[torch.Tensor | None, Array("int32", "num_seqs", low=-1, pad=-1, doc="row of each sequence; "
                                                    "present where layers of the model keep a state per row",
                                                    advance=rules.state_rows)] = None
    sample_counts: Annotated[torch.Tensor | None, Array("int32", "num_verified", low=0, advance=rules.sample_counts,
                                                       doc="rows of logits_indices to sample of each sampled sequence: "
                                                       "one for each of its drafts, which are its last tokens, and one "
                                                       "for the token before them; absent: one of each, and no drafts"
                                                       )] = None
    max_samples: Annotated[int, Doc("the largest of sample_counts")] = 1
    num_proposals: Annotated[int, Doc("tokens that a proposer on the ranks gives each sampled sequence")] = 0

    if TYPE_CHECKING:  # the features' fields
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def check(self) -> None:
        """Semantic check (HAL_STRICT=1): the tensors describe one consistent batch.

        Raises:
            InputError: query_start_loc is not a partition, positions or slots do not follow from seq_lens and
                block_tables, a live slot is written twice or by padding, or an index points outside the batch.
        """
        super().check()
        # In int64, where no difference or product of a message's values can overflow.
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
        if self.state_rows is not None:
            held = self.state_rows.cpu().numpy()[queries > 0]
            if (held < 0).any() or len(np.unique(held)) != len(held):
                self._refuse("state_rows", held, "a row of its own for each sequence")
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
            # Each sequence by itself is right, so two sequences' tables name the same block where they write.
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
        if self.sample_counts is not None:
            self._check_drafts(self.sample_counts.cpu().numpy().astype(np.int64))
        for feature in FEATURES:
            there = [name for name in feature.fields if self[name] is not None]
            if feature.together and there and len(there) < len(feature.fields):
                self._refuse(there[0], f"only {', '.join(there)}", f"all of {', '.join(feature.fields)}, or none")
            for name in there:
                if feature.fields[name].dims[0].symbol == "num_sampled" and len(self[name]) < self.num_samples:
                    self._refuse(name, f"{len(self[name])} rows", f"at least num_samples ({self.num_samples})")

    def _check_drafts(self, counts: np.ndarray) -> None:
        if counts.sum() != self.num_samples or self.max_samples != counts.max(initial=1):
            self._refuse("sample_counts", f"{counts}, the largest {self.max_samples}",
                         f"counts that add up to num_samples ({self.num_samples})")
        counts = counts[counts > 0]  # others are padding
        last = np.cumsum(counts) - 1
        rows, ends = self.logits_indices.cpu().numpy()[:self.num_samples], self.query_start_loc.cpu().numpy()[1:] - 1
        expected = np.repeat(rows[last] - last, counts) + np.arange(len(rows))
        if (rows != expected).any() or not np.isin(rows[last], ends).all():
            self._refuse("logits_indices", rows, f"the last tokens of sequences, {counts} of them")

    def _refuse(self, field: str, got: object, expected: object) -> None:
        raise InputError(f"{type(self).__name__}.{field} is inconsistent", got=got, expected=expected, fields=(field,))
