"""The state of the running sequences on a rank that prepares. Each sequence has a row, which requests change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from hal.contracts.inputs import NULL_BLOCK, PagedModelInput, SamplingInput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.errors import StateError
from hal.features import COLUMNS, FEATURES
from hal.features.declare import StepRows
from hal.schema import Packed

Ints = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
_COLUMN_AT = {c.name: (kind, i, c.dtype) for kind, columns in COLUMNS.items() for i, c in enumerate(columns)}
_NAMES = {kind: [c.name for c in columns] for kind, columns in COLUMNS.items()}
_ALL = slice(None)
_TEMPERATURE = _COLUMN_AT["temperature"][1]
_DEFAULTS = {kind: np.array([c.default for c in columns], {"float": np.float32, "int": np.int64}[kind])
             for kind, columns in COLUMNS.items()}
_NOT_SEED = np.array([c.name != "seed" for c in COLUMNS["int"]])  # every sequence has one; only a drawn one uses it
_EXTRA_SYMBOLS = {name: [d.symbol for d in array.dims] for f in FEATURES for name, array in f.fields.items()}
_EXTRA_SYMBOLS["sample_counts"] = ["num_verified"]
_ALWAYS = tuple(i for i, f in enumerate(FEATURES) if f.always)
_ASKED = tuple(i for i, f in enumerate(FEATURES) if not f.always)
_FOR_SAMPLING = tuple(i for i, f in enumerate(FEATURES) if f.for_sampling)
_PER_STEP = tuple((next(iter(f.request)), i) for i, f in enumerate(FEATURES) if f.per_step and not f.always)

# (dims, scalars of a step) -> (larger dims, optional arrays that must be present)
ChooseShape = Callable[[Mapping[str, int], Mapping[str, Any]], tuple[Mapping[str, int], Iterable[str]]]


def exact_shape(dims: Mapping[str, int], values: Mapping[str, Any]) -> tuple[Mapping[str, int], Iterable[str]]:
    """The step's own size, without padding."""
    return {}, ()


def _asked(floats: np.ndarray[Any, Any], ints: np.ndarray[Any, Any]) -> frozenset[str]:
    """The columns in which a row differs from the default."""
    of_floats, of_ints = np.flatnonzero(floats.any(0)).tolist(), np.flatnonzero(ints.any(0)).tolist()
    return frozenset([*(_NAMES["float"][i] for i in of_floats), *(_NAMES["int"][i] for i in of_ints)])


def _column(floats: np.ndarray[Any, Any], ints: np.ndarray[Any, Any], name: str, rows: Ints | slice = _ALL,
            ) -> np.ndarray[Any, Any]:
    """A feature's column out of rows of all columns, in the column's dtype."""
    kind, at, dtype = _COLUMN_AT[name]
    values: np.ndarray[Any, Any] = (floats if kind == "float" else ints)[rows, at]
    return values.astype(dtype, copy=False)


def _each_place(firsts: Ints, counts: Ints) -> Ints:
    """firsts[i], firsts[i] + 1 and so on, counts[i] of them, for each i."""
    places: Ints = np.arange(counts.sum()) + np.repeat(firsts - np.cumsum(counts) + counts, counts)
    return places


def _arrays(found: Mapping[str, Any], dims: dict[str, int], values: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays among what features made of a step. `dims` and `values` take the sizes and the scalars."""
    arrays = {}
    for name, value in found.items():
        if isinstance(value, int):
            values[name] = value
            continue
        arrays[name] = value
        for symbol, length in zip(_EXTRA_SYMBOLS[name], value.shape, strict=True):
            if symbol:  # not a constant
                dims.setdefault(symbol, length)
    return arrays


class BatchState:
    """Args:
        max_rows: rows, EngineConfig.max_num_seqs. max_model_len: tokens of a row. block_size: tokens per KV block.
        vocab_size: token ids of new sequences lie below it.
        input_type: the step input that `prepare` makes. asynchronous: sampled tokens may stay on the device for a step.

    Attributes:
        token_ids: int32 [max_rows, max_model_len]. num_tokens, prompt_lens, num_blocks: int32 [max_rows].
        block_tables: int32 [max_rows, max_blocks], the null block behind the last.
        floats, ints: sampling parameters [max_rows, ...], columns as in `hal.features.COLUMNS`.
        has_row_states: layers of the model keep a state per row, so inputs name each sequence's row. The runner sets it
            once it has loaded the model.
    """

    def __init__(self, max_rows: int, max_model_len: int, block_size: int, vocab_size: int,
                 input_type: type[PagedModelInput] = PagedModelInput, *,
                 asynchronous: bool = False) -> None:
        self.block_size, self.vocab_size, self.input_type = block_size, vocab_size, input_type
        self.asynchronous, self.has_row_states = asynchronous, False
        self.token_ids = np.zeros((max_rows, max_model_len), np.int32)
        self.block_tables = np.full((max_rows, -(-max_model_len // block_size)), NULL_BLOCK, np.int32)
        self.num_tokens, self.prompt_lens, self.num_blocks = np.zeros((3, max_rows), np.int32)
        self.floats = np.zeros((max_rows, len(COLUMNS["float"])), np.float32)
        self.ints = np.zeros((max_rows, len(COLUMNS["int"])), np.int64)
        self._states = [f.make_state(max_rows, vocab_size) for f in FEATURES]
        self._special = np.zeros(max_rows, np.bool_)  # rows for which a feature has something to do
        self._last: tuple[StepRows, int] | None = None  # of `prepare`, and how many sampled rows its input has
        self.epoch = self.step = self.digest = 0

    def apply(self, request: ExecuteModelRequest) -> None:
        """Apply the changes since the step before.

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
            lens, counts = self.num_tokens[rows], request.append_counts
            if counts is None:
                self.token_ids[rows, lens] = request.append_tokens
                self.num_tokens[rows] = lens + 1
            else:
                most = int(counts.max())
                if len(rows) * most == len(request.append_tokens):  # each gained as many: an outer product of places
                    places = lens[:, None] + np.arange(most)
                    self.token_ids[rows[:, None], places] = request.append_tokens.reshape(-1, most)
                else:
                    self.token_ids[np.repeat(rows, counts), _each_place(lens, counts)] = request.append_tokens
                self.num_tokens[rows] = lens + counts
        if len(request.block_rows):
            self._set_blocks(request.block_rows.astype(np.intp), request.block_starts, request.block_counts,
                             request.new_blocks)
        self.epoch, self.step, self.digest = request.epoch, request.step + 1, request.chain()

    def prepare(self, request: ExecuteModelRequest, choose_shape: ChooseShape = exact_shape) -> Packed[PagedModelInput]:
        """The input of an applied request's step. A sequence is sampled when the step reaches its last token.

        Args:
            choose_shape: takes the step's dims and scalars. Returns the larger dims to pad to, and the optional arrays
                that must be present. The input is then padded as `Packed.padded` would do it, without a copy.
        """
        rows, computed, queries = request.rows.astype(np.intp), request.num_computed, request.num_scheduled
        n, total, size = len(rows), int(queries.sum()), self.block_size
        ends = known = computed + queries
        if request.draft_counts is not None and request.draft_tokens is not None:
            known = ends - request.draft_counts
            self._place(rows, request.draft_counts, request.draft_tokens)
        starts = np.arange(n + 1)
        row_of, positions, decodes = rows, computed.astype(np.intp), n  # the first two of each token
        if total != n:
            decodes = int(np.count_nonzero(queries == 1))
            np.cumsum(queries, out=starts[1:])
            row_of = np.repeat(rows, queries)
            positions = np.arange(total) + np.repeat(positions - starts[:-1], queries)
        sampled = np.flatnonzero(known == self.num_tokens[rows])
        ids, of_place = starts[sampled + 1] - 1, rows[sampled]
        found: dict[str, Any] = {}
        if request.draft_counts is not None:
            counts = 1 + request.draft_counts[sampled]
            ids, of_place = _each_place(ids - counts + 1, counts), np.repeat(of_place, counts)
            found |= {"max_samples": int(counts.max(initial=1)), "sample_counts": counts}
        step = StepRows(self, request, of_place, ids, row_of, positions, self.token_ids[row_of, positions],
                        np.zeros(0, np.intp))
        for i in _ALWAYS:
            found |= FEATURES[i].prepare(step, self._states[i])
        special = bool(np.count_nonzero(self._special[rows]))
        if special:
            self._gather(step)
        for i in _ASKED if special else [i for name, i in _PER_STEP if request[name] is not None]:
            found |= FEATURES[i].prepare(step, self._states[i])
        targets = step.targets
        ahead = request.num_steps - 1
        width = min(-(-(int(ends.max()) + ahead) // size), self.block_tables.shape[1]) if n else 0
        dims = {"num_tokens": total, "num_seqs": n, "max_blocks": width, "num_logits": len(ids) + len(targets),
                "num_sampled": len(ids), "num_targets": len(targets)}
        values = {"block_size": size, "num_decode_seqs": decodes, "num_samples": len(ids),
                  "max_query_len": 1 if total == n > 0 else int(queries.max(initial=0)), "num_steps": ahead + 1,
                  "num_proposals": request.num_proposals}
        fields = _arrays(found, dims, values)
        if self.has_row_states:
            fields["state_rows"] = rows
        larger, also = choose_shape(dims, values)
        self._last = step, larger.get("num_sampled", len(ids))
        packed: Packed[PagedModelInput] = self.input_type.schema.allocate(
            {**dims, **larger}, {*fields, *also}, **values)
        columns = positions // size  # the slot is block * size + position % size
        fields |= {"input_ids": step.input_ids, "positions": positions, "query_start_loc": starts, "seq_lens": ends,
                   "block_tables": self.block_tables[rows, :width],
                   "slot_mapping": (self.block_tables[row_of, columns] - columns) * size + positions,
                   "logits_indices": np.concatenate((ids, targets)) if len(targets) else ids}
        for name in packed.arrays:
            packed.fill(name, fields.get(name))
        return packed

    def _place(self, rows: Ints, counts: Ints, drafts: Ints) -> None:
        """Write drafts behind the tokens of their rows. They are none of these tokens: the next step's overwrite them.
        """
        self.token_ids[np.repeat(rows, counts), _each_place(self.num_tokens[rows], counts)] = drafts

    def prepare_sampling(self, sampling: SamplingRequest) -> Packed[SamplingInput]:
        """What arrived for the step that was prepared last, with as many sampled rows as its input has.

        Raises:
            StateError: it is of another step.
        """
        if self._last is None or self._last[0].request.step != sampling.step:
            raise StateError("what sampling needs is not of the step that was prepared last", got=sampling.step,
                             expected="none" if self._last is None else self._last[0].request.step)
        (step, rows), found = self._last, dict[str, Any]()
        step.request.join(sampling)
        self._gather(step)
        for i in _FOR_SAMPLING:
            feature, state = FEATURES[i], self._states[i]
            if any(sampling[name] is not None for name in feature.request):
                if state is not None:
                    self._special[state.apply(step.request)] = True
                found |= feature.prepare(step, state)
        dims = {"num_sampled": rows}
        fields = _arrays(found, dims, {})
        packed: Packed[SamplingInput] = SamplingInput.schema.allocate(dims, fields)
        for name, array in fields.items():
            packed.fill(name, array)
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
        if self.has_row_states:
            self._verify_states(request)

    def _verify_states(self, request: ExecuteModelRequest) -> None:
        """A sequence begins at its first token, or brings its state from the host."""
        given = np.zeros(0, np.int32) if request.rows_to_swap_in is None else request.rows_to_swap_in[:, 1]
        bare = np.isin(request.rows, request.new_rows) & (request.num_computed > 0) & ~np.isin(request.rows, given)
        if bare.any():
            raise StateError("a sequence enters a row with computed tokens, but without the state of a layer that "
                             "keeps one per row", got=f"rows {request.rows[bare].tolist()}, num_computed "
                             f"{request.num_computed[bare].tolist()}", expected="num_computed 0, or rows_to_swap_in",
                             hint="do not share prefixes where Executor.has_row_states is true")

    def _enter(self, request: ExecuteModelRequest) -> None:
        rows, at = request.new_rows, 0
        for row, length in zip(rows.tolist(), request.new_lens.tolist(), strict=True):
            self.token_ids[row, :length] = request.new_tokens[at:at + length]
            at += length
        self.num_tokens[rows], self.prompt_lens[rows] = request.new_lens, request.new_prompt_lens
        self.block_tables[rows], self.num_blocks[rows] = NULL_BLOCK, 0
        self.floats[rows], self.ints[rows] = floats, ints = request.new_floats, request.new_ints
        self._special[rows] = (floats != _DEFAULTS["float"]).any(1) | ((ints != _DEFAULTS["int"]) & _NOT_SEED).any(1)
        for state in self._states:
            if state is not None:
                self._special[state.apply(request)] = True

    def _set_blocks(self, rows: Ints, starts: Ints, counts: Ints, blocks: Ints) -> None:
        ends = starts + counts
        for i in np.flatnonzero(ends < self.num_blocks[rows]).tolist():  # tables that shrink: rare
            self.block_tables[rows[i], ends[i]:] = NULL_BLOCK
        self.num_blocks[rows] = ends
        if (counts != 1).any():
            starts = np.arange(len(blocks)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
            rows = np.repeat(rows, counts)
        self.block_tables[rows, starts] = blocks

    def _gather(self, step: StepRows) -> None:
        """Set the columns of the sampled rows, and the names of the columns that a sampled row asks for."""
        floats, ints = self.floats[step.sampled], self.ints[step.sampled]
        unusual = floats != _DEFAULTS["float"], (ints != _DEFAULTS["int"]) & _NOT_SEED
        step.column = partial(_column, floats, ints)
        step.asked = _asked(*unusual)
        if "temperature" in step.asked:
            drawn = floats[:, _TEMPERATURE] > 0
            step.asked_drawn = step.asked if drawn.all() else _asked(*(some[drawn] for some in unusual))

    def column(self, name: str, rows: Ints) -> np.ndarray[Any, Any]:
        """The values of a feature's column for these rows, in the column's dtype."""
        return _column(self.floats, self.ints, name, rows)
