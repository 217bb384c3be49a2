"""The sequences in flight, as every rank that prepares holds them: one row each, changed by a request's diffs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from hal.errors import StateError
from hal.inputs import NULL_BLOCK, PagedModelInput
from hal.request import FLOAT_PARAMS, INT_PARAMS, UNKNOWN_TOKEN, ExecuteModelRequest
from hal.schema import Packed

Ints = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
_FLOAT, _INT = ({name: i for i, name in enumerate(names)} for names in (FLOAT_PARAMS, INT_PARAMS))
_PENALTIES = slice(_FLOAT["repetition_penalty"], _FLOAT["frequency_penalty"] + 1)
_NO_PENALTIES = np.array([1.0, 0.0, 0.0], np.float32)


Bucket = Callable[[Mapping[str, int], Mapping[str, Any]], tuple[dict[str, int], Iterable[str]]]


def no_bucket(dims: Mapping[str, int], values: Mapping[str, Any]) -> tuple[dict[str, int], Iterable[str]]:
    """A step as large as it is."""
    return {}, ()


class BatchState:
    """Args:
        max_rows: rows, EngineConfig.max_num_seqs. max_model_len: tokens of a row. block_size: tokens per KV block.
        vocab_size: token ids of new sequences lie below it.
        input_type: the step input that `prepare` makes. relay: it says where sampled tokens are kept on the device.

    Attributes:
        token_ids: int32 [max_rows, max_model_len]. num_tokens, prompt_lens, num_blocks: int32 [max_rows].
        block_tables: int32 [max_rows, max_blocks], the null block behind the last.
        floats, ints: sampling parameters [max_rows, ...], columns as in `hal.request`.
    """

    def __init__(self, max_rows: int, max_model_len: int, block_size: int, vocab_size: int,
                 input_type: type[PagedModelInput] = PagedModelInput, *, relay: bool = False) -> None:
        self.block_size, self.vocab_size, self.input_type, self.relay = block_size, vocab_size, input_type, relay
        self.token_ids = np.zeros((max_rows, max_model_len), np.int32)
        self.block_tables = np.full((max_rows, -(-max_model_len // block_size)), NULL_BLOCK, np.int32)
        self.num_tokens, self.prompt_lens, self.num_blocks = np.zeros((3, max_rows), np.int32)
        self.floats = np.zeros((max_rows, len(FLOAT_PARAMS)), np.float32)
        self.ints = np.zeros((max_rows, len(INT_PARAMS)), np.int64)
        self._special = np.zeros(max_rows, np.bool_)  # not plain greedy, or logprobs were asked for
        self.epoch = self.step = self.digest = 0

    def apply(self, request: ExecuteModelRequest) -> None:
        """Take over what changed since the step before.

        Raises:
            StateError: the request is not the next one (epoch, step, digest), or it brings a token or a length that
                the model does not have. The state is unchanged.
        """
        self._verify(request)
        if len(request.finished_rows):
            self.num_tokens[request.finished_rows] = 0
        if len(request.new_rows):
            self._enter(request)
        if len(request.append_rows):
            rows = request.append_rows.astype(np.intp)  # indexing with another integer type converts every time
            lens = self.num_tokens[rows]
            self.token_ids[rows, lens] = request.append_tokens
            self.num_tokens[rows] = lens + 1
        if len(request.block_rows):
            self._set_blocks(request.block_rows.astype(np.intp), request.block_starts, request.block_counts,
                             request.new_blocks)
        self.epoch, self.step, self.digest = request.epoch, request.step + 1, request.chain()

    def prepare(self, request: ExecuteModelRequest, bucket: Bucket = no_bucket) -> Packed[PagedModelInput]:
        """The input of an applied request's step. A sequence is sampled when the step reaches its last token.

        Args:
            bucket: given the step's dims and scalars, larger dims, and optional arrays that are there in any case: what
                `Packed.padded` takes, without a copy.
        """
        rows, computed, queries = request.rows.astype(np.intp), request.num_computed, request.num_scheduled
        n, total, size = len(rows), int(queries.sum()), self.block_size
        ends = computed + queries
        starts = np.arange(n + 1)
        row_of, positions, decodes = rows, computed.astype(np.intp), n  # the first two of each token
        if total != n:
            decodes = int(np.count_nonzero(queries == 1))
            np.cumsum(queries, out=starts[1:])
            row_of = np.repeat(rows, queries)
            positions = np.arange(total) + np.repeat(positions - starts[:-1], queries)
        sampled = np.flatnonzero(ends == self.num_tokens[rows])
        fields: dict[str, np.ndarray[Any, Any]] = {}
        wanted = np.zeros(0, np.intp)
        logprobs = prompt_logprobs = -1
        if np.count_nonzero(self._special[rows]):  # several times faster than any()
            fields, logprobs = self._sampling(rows[sampled])
            wanted, prompt_logprobs = self._prompt_logprobs(row_of, positions)
            if len(wanted):
                fields["prompt_targets"] = self.token_ids[row_of[wanted], positions[wanted] + 1]
        input_ids = self.token_ids[row_of, positions]
        if self.relay:
            fields["sampled_rows"] = rows[sampled]
            unknown = input_ids == UNKNOWN_TOKEN
            if np.count_nonzero(unknown):
                fields["relay"], input_ids = np.where(unknown, row_of, -1), np.where(unknown, 0, input_ids)
        width = -(-int(ends.max()) // size) if n else 0
        dims = {"num_tokens": total, "num_seqs": n, "max_blocks": width, "num_logits": len(sampled) + len(wanted),
                "num_sampled": len(sampled), "num_targets": len(wanted),
                "max_history": fields["history"].shape[1] if "history" in fields else 0}
        values = {"block_size": size, "num_decode_seqs": decodes, "num_samples": len(sampled),
                  "max_query_len": 1 if total == n > 0 else int(queries.max(initial=0)),
                  "num_logprobs": logprobs, "num_prompt_logprobs": prompt_logprobs}
        larger, also = bucket(dims, values)
        packed: Packed[PagedModelInput] = self.input_type.schema.allocate(
            dims | larger, {*fields, *also}, **values)
        columns = positions // size  # the slot is block * size + position % size
        ids = starts[sampled + 1] - 1
        fields |= {"input_ids": input_ids, "positions": positions, "query_start_loc": starts, "seq_lens": ends,
                   "block_tables": self.block_tables[rows, :width],
                   "slot_mapping": (self.block_tables[row_of, columns] - columns) * size + positions,
                   "logits_indices": np.concatenate((ids, wanted)) if len(wanted) else ids}
        for name in packed.arrays:
            packed.fill(name, fields.get(name))
        return packed

    def _verify(self, request: ExecuteModelRequest) -> None:
        starts_over = request.epoch > self.epoch and request.step == 0
        expected = (request.epoch, 0, 0) if starts_over else (self.epoch, self.step, self.digest)
        got = request.epoch, request.step, request.digest
        if got != expected:
            form = "epoch {}, step {}, digest {}".format
            raise StateError("a request does not follow the one before it", got=form(*got), expected=form(*expected),
                             hint="a step was lost, repeated or changed on its way to this rank")
        if not len(request.new_rows):
            return
        if request.new_tokens.max() >= self.vocab_size:
            raise StateError("a new sequence holds a token id that the model does not have",
                             got=int(request.new_tokens.max()), expected=f"below {self.vocab_size}")
        if request.new_lens.max() > self.token_ids.shape[1]:
            raise StateError("a new sequence is longer than max_model_len", got=int(request.new_lens.max()),
                             expected=f"at most {self.token_ids.shape[1]}")

    def _enter(self, request: ExecuteModelRequest) -> None:
        rows, at = request.new_rows, 0
        for row, length in zip(rows.tolist(), request.new_lens.tolist(), strict=True):
            self.token_ids[row, :length] = request.new_tokens[at:at + length]
            at += length
        self.num_tokens[rows], self.prompt_lens[rows] = request.new_lens, request.new_prompt_lens
        self.block_tables[rows], self.num_blocks[rows] = NULL_BLOCK, 0
        self.floats[rows], self.ints[rows] = floats, ints = request.new_floats, request.new_ints
        self._special[rows] = ((floats[:, _FLOAT["temperature"]] > 0) | (floats[:, _PENALTIES] != _NO_PENALTIES).any(1)
                               | (ints[:, _INT["logprobs"]:] >= 0).any(1))

    def _set_blocks(self, rows: Ints, starts: Ints, counts: Ints, blocks: Ints) -> None:
        ends = starts + counts
        for i in np.flatnonzero(ends < self.num_blocks[rows]).tolist():  # tables that shrink: rare
            self.block_tables[rows[i], ends[i]:] = NULL_BLOCK
        self.num_blocks[rows] = ends
        if (counts != 1).any():
            starts = np.arange(len(blocks)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
            rows = np.repeat(rows, counts)
        self.block_tables[rows, starts] = blocks

    def _sampling(self, rows: Ints) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
        """The sampling fields that these rows need, and the most logprobs that any of them asked for."""
        floats, ints = self.floats[rows], self.ints[rows]
        fields: dict[str, np.ndarray[Any, Any]] = {}
        temperature = floats[:, _FLOAT["temperature"]]
        random = temperature > 0
        if random.any():
            fields["temperature"], fields["seeds"] = temperature, ints[:, _INT["seed"]]
            for name, column, none in (("top_k", ints[:, _INT["top_k"]], 0), ("top_p", floats[:, _FLOAT["top_p"]], 1),
                                       ("min_p", floats[:, _FLOAT["min_p"]], 0)):
                if (column[random] != none).any():
                    fields[name] = column
        penalties = floats[:, _PENALTIES]
        if (penalties != _NO_PENALTIES).any():
            lens = self.num_tokens[rows]
            width = int(lens.max())
            fields["penalties"], fields["prompt_lens"] = penalties, self.prompt_lens[rows]
            fields["history"] = np.where(np.arange(width) < lens[:, None], self.token_ids[rows, :width], -1)
        return fields, int(ints[:, _INT["logprobs"]].max(initial=-1))

    def _prompt_logprobs(self, rows: Ints, positions: Ints) -> tuple[Ints, int]:
        """Which of the step's tokens (given by row and position) are followed by a prompt token whose logprob was asked
        for, and the most that any of them asked for."""
        asked = self.ints[rows, _INT["prompt_logprobs"]]
        wanted = np.flatnonzero((asked >= 0) & (positions + 1 < self.prompt_lens[rows]))
        return wanted, int(asked[wanted].max(initial=-1))
