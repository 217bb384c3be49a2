"""vLLM's SchedulerOutput as hal's ExecuteModelRequest. Both describe a step by its differences to the step before.

vLLM has two dialects. Under the V1 model runner a resumed request comes as a cached one with all its tokens; under the
V2 model runner it comes as a new one. Under both, ranks are expected to remember the tokens that they sampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from hal.constrained.rules import Words
from hal.contracts.request import ExecuteModelRequest
from hal.engine.sequence import derive_seed
from hal.errors import RequestError
from hal.features import COLUMNS
from hal.features.pending import PENDING_TOKEN
from hal_vllm.constraints import rules_of
from hal_vllm.fields import refuse_unknown
from hal_vllm.params import columns, needs_tokens, number_of_logprobs
from hal_vllm.rows import BlockTables, Request, Scheduled, Step

_NONE = np.zeros(0, np.int32)
_NOBODY = {"new_rows": _NONE, "new_lens": _NONE, "new_prompt_lens": _NONE, "new_tokens": _NONE,
           "new_floats": np.zeros((0, len(COLUMNS["float"])), np.float32),
           "new_ints": np.zeros((0, len(COLUMNS["int"])), np.int64)}  # the fields of a step that no request enters


class Translator:
    """Args:
        max_rows: EngineConfig.max_num_seqs. seed: the engine's.

    Attributes:
        requests: unfinished requests by id.
        length, told, unknown, last: of each row, the number of its tokens (`unknown` of them are still on the device),
            of the tokens that ranks were told of, and the token sampled last.
    """

    def __init__(self, max_rows: int, vocab_size: int, seed: int) -> None:
        self.vocab_size, self.seed = vocab_size, seed
        self.requests: dict[str, Request] = {}
        self.length, self.told, self.unknown, self.last, self.occupant = np.zeros((5, max_rows), np.int64)
        self.num_blocks = [0] * max_rows
        self._at: list[Request | None] = [None] * max_rows
        self._free = list(range(max_rows - 1, -1, -1))
        self._left: list[int] = []  # rows given up since the last request
        self._copies: list[Any] = []
        self._special: set[str] = set()  # running requests that a step treats one by one
        self._waiting: set[str] = set()  # running requests whose steps need all their tokens
        self._entered = self._step = self._digest = 0
        self._steady: Scheduled | None = None  # the last step's requests, where all of them are decodes

    def must_wait(self, so: SchedulerOutput) -> bool:
        """Whether a scheduled request needs tokens that are still on the device, because it has penalties or bad words
        of several tokens."""
        return bool(self._waiting) and any(
            req_id in so.num_scheduled_tokens and self.unknown[self.requests[req_id].row] for req_id in self._waiting)

    def translate(self, so: SchedulerOutput) -> Step | None:
        """The next step, or None if vLLM scheduled no token; then its other content comes with a later step.

        Raises:
            RequestError: the step asks for something that hal does not have.
        """
        refuse_unknown(so)
        cached = so.scheduled_cached_reqs
        refuse_unknown(cached)
        for req_id in so.preempted_req_ids or ():
            self._leave(req_id)
        for req_id in so.finished_req_ids:
            self._leave(req_id)
            self.requests.pop(req_id, None)
        for req_id in cached.resumed_req_ids:
            self._leave(req_id)
        self._copies += so.kv_cache_block_copies or ()
        if not so.total_num_scheduled_tokens:
            return None
        tables = BlockTables()
        entered = self._enter_all(so, tables)
        return self._issue(so, entered, tables)

    def _leave(self, req_id: str) -> None:
        request = self.requests.get(req_id)
        if request is None or request.row < 0:
            return
        self._at[request.row] = None
        self.occupant[request.row] += 1  # an output in flight no longer belongs to the row
        self._left.append(request.row)
        self._free.append(request.row)
        request.row, self._steady = -1, None
        self._special.discard(req_id)
        self._waiting.discard(req_id)

    def _enter_all(self, so: SchedulerOutput, tables: BlockTables) -> list[Request]:
        """Returns the requests that enter rows. Every block table that grows goes into `tables`."""
        cached, entered = so.scheduled_cached_reqs, list[Request]()
        for new in so.scheduled_new_reqs:
            refuse_unknown(new)
            self._leave(new.req_id)  # a streaming session sends a live request again
            old = self.requests.get(new.req_id)
            tokens = list(new.prefill_token_ids or new.prompt_token_ids or ())
            if old is not None and old.params is new.sampling_params and len(new.prompt_token_ids) == old.num_prompt:
                old.tokens = tokens
            else:
                old = self.requests[new.req_id] = self._admit(new, tokens, None if old is None else old.seed)
            entered.append(self._enter(old, new.block_ids[0], tables))
        ids, requests, num_blocks = cached.req_ids, self.requests, self.num_blocks
        for i, blocks in [(i, blocks) for i, blocks in enumerate(cached.new_block_ids) if blocks is not None]:
            request = requests[ids[i]]
            if request.row < 0:
                request.tokens = list(cached.all_token_ids[request.req_id])
                entered.append(self._enter(request, blocks[0], tables))
            elif blocks[0]:
                tables.add(request.row, num_blocks[request.row], blocks[0])
                num_blocks[request.row] += len(blocks[0])
        return entered

    def _admit(self, new: NewRequestData, tokens: list[int], seed: int | None) -> Request:
        params = new.sampling_params
        if params is None or not tokens:
            raise RequestError("hal's ranks generate text from token ids", got=f"request {new.req_id} without "
                               f"{'tokens' if params is not None else 'sampling parameters'}")
        if seed is None:
            seed = derive_seed(self.seed, self._entered) if params.seed is None else params.seed
        self._entered += 1
        return Request(new.req_id, params, seed, tokens, len(new.prompt_token_ids or ()),
                       rules_of(params, self.vocab_size), needs_tokens(params),
                       params.structured_outputs is not None,
                       number_of_logprobs(params.prompt_logprobs, self.vocab_size))

    def _enter(self, request: Request, blocks: list[int], tables: BlockTables) -> Request:
        row = request.row = self._free.pop()
        self._at[row], self._steady = request, None
        self.length[row] = self.told[row] = len(request.tokens)
        self.unknown[row], self.num_blocks[row] = 0, len(blocks)
        self.occupant[row] += 1
        tables.add(row, 0, blocks)
        request.prompt_parts = []
        wants_prompt = request.prompt_logprobs >= 0 and len(request.tokens) == request.num_prompt
        if request.constraints is not None or request.grammar or wants_prompt:
            self._special.add(request.req_id)
        if request.needs_tokens:
            self._waiting.add(request.req_id)
        return request

    def _scheduled(self, so: SchedulerOutput) -> tuple[Scheduled, np.ndarray, np.ndarray]:
        """The scheduled requests, and the tokens of each to compute and already computed. Those with one token to
        compute come first."""
        cached, new = so.scheduled_cached_reqs, so.scheduled_new_reqs
        ids, computed = cached.req_ids, cached.num_computed_tokens
        total = so.total_num_scheduled_tokens
        if new:
            ids = [*ids, *(r.req_id for r in new)]
            computed = [*computed, *(r.num_computed_tokens for r in new)]
        steady = self._steady
        if steady is not None and total == len(ids) and steady.ids == ids:
            return steady, steady.ones, np.array(computed, np.int64)
        counts = np.ones(len(ids), np.int32)
        if total != len(ids):
            counts[:] = [so.num_scheduled_tokens[req_id] for req_id in ids]
            order = np.argsort(counts != 1, kind="stable")
            counts, computed = counts[order], np.array(computed, np.int64)[order]
            ids = [ids[i] for i in order.tolist()]
        owners = list(map(self.requests.__getitem__, ids))
        found = Scheduled(list(ids), owners, np.array([request.row for request in owners], np.int64))
        self._steady = found if total == len(ids) else None  # a step of decodes has vLLM's order
        return found, counts, np.array(computed, np.int64)

    def _issue(self, so: SchedulerOutput, entered: list[Request], tables: BlockTables) -> Step:
        found, counts, computed = self._scheduled(so)
        rows, every = found.rows, found.rows32
        length = self.length[rows]
        ends = computed + counts
        gained = length > self.told[rows]
        appended, appended32 = (rows, every) if gained.all() else (rows[gained], every[gained])
        unknown = self.unknown[appended]
        tokens = self.last[appended]
        if unknown.any():
            tokens[unknown > 0] = PENDING_TOKEN
        sampling = ends == length
        sampled = None if sampling.all() else np.flatnonzero(sampling)
        special = bool(self._special)
        grammar = special and any(r.grammar and r.req_id in found.index
                                  for r in map(self.requests.get, self._special) if r)
        grammar = grammar or bool(so.has_structured_output_requests)
        fields: dict[str, Any] = self._entering(entered) if entered else _NOBODY
        request = ExecuteModelRequest(
            step=self._step, digest=self._digest, finished_rows=_ints(self._left), append_rows=appended32,
            append_tokens=tokens.astype(np.int32), block_rows=_ints(tables.rows), block_starts=_ints(tables.starts),
            block_counts=_ints(tables.counts), new_blocks=_ints(tables.blocks), rows=every, num_scheduled=counts,
            num_computed=computed.astype(np.int32),
            blocks_to_copy=np.array(self._copies, np.int32).reshape(-1, 2) if self._copies else None, **fields)
        self._left, self._copies = [], []
        self._step, self._digest = self._step + 1, request.chain()
        self.told[appended] = length if appended is rows else length[gained]
        step = Step(request, found.ids, found.index, rows, self.occupant[rows], sampled, found.owners, [], grammar)
        if special:
            self._prompt_targets(step, computed, ends)
            if not grammar:  # else the masks come with vLLM's
                for name, array in self.masks(step, {}).items():
                    setattr(request, name, array)
        if sampled is None:
            self.length[rows] = length + 1
            self.unknown[rows] = (unknown if appended is rows else self.unknown[rows]) + 1
        else:
            gaining = rows[sampled]
            self.length[gaining] += 1
            self.unknown[gaining] += 1
        return step

    def _entering(self, entered: list[Request]) -> dict[str, Any]:
        floats, ints = zip(*(columns(r.params, r.seed, r.prompt_logprobs if len(r.tokens) == r.num_prompt else -1,
                                     self.vocab_size) for r in entered), strict=True)
        fields: dict[str, Any] = {
            "new_rows": _ints([r.row for r in entered]), "new_lens": _ints([len(r.tokens) for r in entered]),
            "new_prompt_lens": _ints([r.num_prompt for r in entered]),
            "new_tokens": _ints([token for r in entered for token in r.tokens]),
            "new_floats": np.array(floats, np.float32), "new_ints": np.array(ints, np.int64)}
        biased = [(r.row, {int(t): x for t, x in r.params.logit_bias.items()}) for r in entered if r.params.logit_bias]
        if biased:
            fields |= {"bias_rows": _ints([row for row, _ in biased]),
                       "bias_counts": _ints([len(bias) for _, bias in biased]),
                       "bias_ids": _ints([token for _, bias in biased for token in bias]),
                       "bias_values": np.array([x for _, bias in biased for x in bias.values()], np.float32)}
        return fields

    def _prompt_targets(self, step: Step, computed: np.ndarray, ends: np.ndarray) -> None:
        for i, request in enumerate(step.owners):
            if request.prompt_logprobs >= 0 and computed[i] + 1 < request.num_prompt and (
                    len(request.tokens) == request.num_prompt):
                step.targets.append((request, int(computed[i]) + 1, min(int(ends[i]) + 1, request.num_prompt)))

    @property
    def special(self) -> bool:
        """Whether a running request is treated one by one: for prompt logprobs, a mask or a grammar."""
        return bool(self._special)

    def take(self, step: Step, tokens: np.ndarray) -> None:
        """Take over the tokens that the step sampled, for the sequences that still have their rows."""
        rows, occupants = step.rows, step.occupants
        if step.sampled is not None:
            rows, occupants = rows[step.sampled], occupants[step.sampled]
        kept = self.occupant[rows] == occupants
        if not kept.all():
            rows, tokens = rows[kept], tokens[kept]
        self.unknown[rows] -= 1
        self.last[rows] = tokens
        if self._special:
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                request = self._at[row]
                if request is not None and request.req_id in self._special:
                    request.tokens.append(token)

    def masks(self, step: Step, grammar: dict[str, Words]) -> dict[str, np.ndarray]:
        """The arrays of token masks for the sampled requests of a step: the intersection of what their own parameters
        and the grammars (by request id) allow. Called before the tokens of the step are counted, or after."""
        rows, found = [], []
        sampled = range(len(step.owners)) if step.sampled is None else step.sampled.tolist()
        for i in sampled:
            request = step.owners[i]
            mask = grammar.get(request.req_id)
            if request.constraints is not None:
                mask = request.constraints.mask(
                    int(step.request.num_computed[i] + step.request.num_scheduled[i]) - request.num_prompt,
                    request.tokens[request.num_prompt:], mask)
            if mask is not None:
                rows.append(int(step.rows[i]))
                found.append(mask)
        return {"mask_rows": _ints(rows), "token_masks": np.stack(found)} if rows else {}


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.array(values, np.int32) if values else _NONE
