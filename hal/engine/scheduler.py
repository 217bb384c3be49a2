"""The scheduler: continuous batching, chunked prefill, prefix caching and preemption.

Policy. A step takes, within max_num_batched_tokens, first every running sequence with one token to compute (decodes),
then chunks of running prompts, then preempted and waiting sequences; in each group the oldest comes first. With
itl_target_ms, the chunks of a step beside decodes are bounded by their expected time (hal/engine/pace.py). A sequence
starts when there are blocks for all its tokens, and takes another block when its tokens need one. If no block is free,
the youngest sequences are preempted. Their KV cache is swapped to the host if there is room, or else computed again
later. In both cases they leave their row and come back as new sequences. All sequences younger than the one that needs
a block are preempted before that one has to wait.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Literal

import numpy as np

from hal.config import AUTO_STEPS, EngineConfig
from hal.engine.blocks import BlockManager
from hal.engine.pace import Pace
from hal.engine.request_output import FinishReason
from hal.engine.scheduled_step import Changes, ScheduledStep
from hal.engine.sequence import Sequence
from hal.errors import CapacityError, StateError
from hal.features import needs_tokens
from hal.features.adapter import Adapter
from hal.features.pending import PENDING_TOKEN
from hal.features.stopping import STOP_IDS

_AGE = attrgetter("request_id")


class Scheduler:
    """Args:
        config: block_size, max_num_seqs, max_num_batched_tokens, prefix_caching and itl_target_ms are read.
        num_blocks, num_cpu_blocks: device and host blocks.
        eos_token_ids: tokens that end a sequence, unless its params ignore them.
        depth: microbatches that may be in flight at once; running sequences are spread over them.
        ahead: a sequence may run again before its last token is known here, because ranks keep that token on the
            device. So a device need not wait for the host. A sequence that has already ended computes one token in
            vain.
        steps: the most decode steps of one message. "auto" chooses while nothing waits: then a sequence that ends
            within them keeps no other from starting.
        has_row_states: layers keep a state per row (see Executor): no prefix is shared, and swaps move states too.
        clock: seconds, by which itl_target_ms is kept.

    Attributes:
        waiting, running: sequences, oldest first.
        length, computed, capacity: of each row, the number of its tokens (`unknown` of them are still on the device),
            of the tokens that the issued steps compute, and of the tokens that its blocks can hold.
    """

    def __init__(self, config: EngineConfig, num_blocks: int, num_cpu_blocks: int = 0, *,
                 eos_token_ids: Iterable[int] = (), depth: int = 1, ahead: bool = False,
                 steps: int | Literal["auto"] = 1, has_row_states: bool = False,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.block_size, self.max_rows = config.block_size, config.max_num_seqs
        self.depth, self.ahead = depth, ahead
        self.steps, self._auto = AUTO_STEPS if steps == "auto" else steps, steps == "auto"
        self.max_num_batched_tokens, self.has_row_states = config.max_num_batched_tokens, has_row_states
        self.prefix_caching = config.prefix_caching and not has_row_states
        self.num_blocks, self.num_cpu_blocks = num_blocks, num_cpu_blocks
        self.speculates = config.speculate is not None
        target = config.itl_target_ms
        self._pace = None if target is None else Pace(target / 1e3, config.block_size, clock)
        self._eos = np.array(sorted(eos_token_ids), np.int64)
        self.epoch = self.step = self.digest = 0
        self._issued: Any = None  # the last step's request
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.blocks = BlockManager(self.num_blocks, self.num_cpu_blocks, prefix_caching=self.prefix_caching)
        self.length, self.unknown, self.computed, self.capacity = (self._per_row(np.int64) for _ in range(4))
        self._told = self._per_row(np.int64)  # tokens that the ranks were told of, those still on the device included
        self._last = self._per_row(np.int64)  # the token sampled last
        self._limit = self._per_row(np.int64)  # length at which the sequence ends; 0 where it ended while in flight
        self._registered = self._per_row(np.int64)  # leading blocks that the prefix cache has been told of
        self._in_flight = self._per_row(np.int64)  # steps that compute the row and are not taken over yet
        self._ends_at_eos = self._per_row(np.bool_)
        self._own_stops = self._per_row(np.bool_)
        self._asks_prompt = self._per_row(np.bool_)
        self._needs_tokens = self._per_row(np.bool_)
        self._one_step = self._per_row(np.bool_)  # the host, or more stop tokens than a step carries, has a say
        self._stop_ids = np.full((self.max_rows, STOP_IDS if self.steps > 1 else 0), -1, np.int32)
        # The tokens that each row gained last, and how many; 0 where they are not kept.
        self._recent = np.zeros((self.max_rows, self.steps if self.steps > 1 else 0), np.int32)
        self._num_recent = self._per_row(np.int64)
        self._known = self._per_row(np.int64)  # tokens of the sequence when it entered the row
        self._num_in_flight = 0
        self._several = False  # a sequence has gained several tokens in one step
        self._free_rows = list(range(self.max_rows - 1, -1, -1))
        # As many as rows: a sequence starts only when all that were swapped out before are back.
        self._free_host_rows = list(range(self.max_rows - 1, -1, -1))
        self._at: list[Sequence | None] = [None] * self.max_rows
        self._order: np.ndarray | None = None  # rows of `running`
        self._leaving: list[Sequence] = []  # finished while in flight
        self._changes = Changes()

    def _per_row(self, dtype: type[np.generic]) -> np.ndarray:
        return np.zeros(self.max_rows, dtype)

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, num_prompt: int, limit: int) -> None:
        """Raises CapacityError when a request of `num_prompt` tokens that may grow to `limit` can never run."""
        needed, usable = -(-max(num_prompt, limit - 1) // self.block_size), self.num_blocks - 1
        if needed > usable:
            raise CapacityError(
                "the KV cache is too small for one request",
                got=f"num_blocks={self.num_blocks}, of which {usable} hold {usable * self.block_size} tokens",
                expected=f"{needed} blocks of {self.block_size} for a prompt of {num_prompt} tokens that may grow to "
                         f"{limit}", hint="raise num_blocks or memory_fraction, or lower max_tokens")

    def add(self, seq: Sequence) -> None:
        """Raises CapacityError (see `check`)."""
        self.check(len(seq.prompt_ids), seq.limit)
        insort(self.waiting, seq, key=_AGE)

    def load_adapter(self, adapter: Adapter) -> None:
        """The next step brings an adapter into its slot."""
        self._changes.loads.append(adapter)

    def ending(self, seq: Sequence) -> FinishReason | None:
        """The reason why a sequence with these tokens is complete, or None when it is not."""
        if seq.output_ids:
            token, params = seq.output_ids[-1], seq.params
            if token in params.stop_token_ids or (not params.ignore_eos and token in self._eos):
                return "stop"
        return "length" if len(seq) >= seq.limit else None

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence now, because of an abort or of a stop that the scheduler cannot see. A finished sequence stays
        as it is. Results of steps in flight are dropped, and the blocks are freed when those steps have ended."""
        if seq.finish_reason is not None:
            return
        seq.finish_reason = reason
        if seq.row < 0:
            self.waiting.remove(seq)
            self._drop_host(seq)
        elif self._in_flight[seq.row]:
            self._limit[seq.row] = 0  # the sequence does not run again
            self._leaving.append(seq)
        else:
            self._leave(seq)

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None when every sequence is in flight or there is none. The step counts as issued: later
        steps rely on its results, because ranks run steps in order."""
        if self._changes.swap_out and not self.running:  # those to profit are gone, and no step carried it out
            for seq in self.waiting:
                self._drop_host(seq, unwritten_only=True)
        rows, running = self._running_rows(), len(self.running)
        if self._num_in_flight:
            rows = rows[self._can_run(rows)]
        left = self.length[rows] - self.computed[rows]
        share = min(-(-len(self.running) // self.depth), self.max_num_batched_tokens)
        wanted = rows[left == 1][:share]
        more = rows[left > 1] if len(wanted) < len(rows) else wanted[:0]
        decodes, grown = self._grow_all(rows, wanted, more) if self._several else (self._grow(wanted), more)
        budget, held = self.max_num_batched_tokens - len(decodes), 0
        if self._pace is not None and (len(decodes) or np.count_nonzero(self.unknown[self._running_rows()])):
            held = max(budget - self._pace.most(len(decodes)), 0)  # kept from prompts
            budget -= held
        chunks: list[tuple[int, int]] = []
        if len(grown):
            for row in grown.tolist():
                if budget > 0 and self._at[row] is not None:  # else preempted just now
                    chunks.append((row, min(int(self.length[row] - self.computed[row]), budget)))
                    budget -= chunks[-1][1]
        pinned: list[int] = []
        if len(decodes) + len(grown) == len(wanted) + len(more) and len(self.running) == running:  # nobody lacks blocks
            while self.waiting and self._free_rows and budget > 0 and not self._changes.swap_out:
                seq = self.waiting[0]
                if not self._enter(seq, pinned):
                    break
                chunks.append((seq.row, min(len(seq) - seq.num_computed, budget)))
                budget -= chunks[-1][1]
        if not len(decodes) and not chunks:
            return None
        drafts = self._drafts(decodes, budget + held) if self.speculates else {}
        gains = None
        if self.steps > 1 and not chunks and not (self._auto and self.waiting):
            gains = self._look_ahead(decodes)
        step = self._issue(decodes, chunks, drafts, gains)
        if self._pace is not None:
            self._pace.begin(len(decodes) if gains is None else 0, sum(count for _, count in chunks))
        self.blocks.release(pinned)
        return step

    def update(self, step: ScheduledStep, token_ids: np.ndarray, counts: np.ndarray | None = None,
               num_computed: np.ndarray | None = None) -> list[Sequence]:
        """Take a step's sampled tokens, in the order of `step.sampled`, and end the sequences that are complete. These
        are returned, with their finish_reason set and their blocks freed. A token of -1 ends its sequence with "error",
        and is not one of its tokens. A sequence that ends within several tokens never has the later ones.

        Args:
            token_ids, counts, num_computed: the arrays of a SamplerOutput.

        Raises:
            StateError: the number of tokens is not that of the sampled sequences, or a sequence gained several tokens
                while it may already run again (`ahead`).
        """
        if self._pace is not None:
            self._pace.end()
        rows, tokens = step.sampled_rows, token_ids.astype(np.int64)
        fits = tokens.shape == rows.shape if counts is None else counts.shape == rows.shape and not self.ahead
        if step.gains is not None:
            fits = counts is not None and counts.shape == rows.shape and bool((counts <= step.gains).all())
        if not fits:
            raise StateError("a step's output does not fit it", got=f"{tokens.shape} sampled tokens" + (
                             "" if counts is None else f" of {len(counts)} sequences, ahead={self.ahead}"),
                             expected=f"one token of each of {len(rows)} sequences, or without `ahead` several",
                             hint="a runner that gives several tokens declares it by tokens_per_row")
        self._in_flight[step.rows] -= 1
        self._num_in_flight -= len(step.rows)
        self.unknown[rows] -= 1 if step.gains is None else step.gains
        if counts is None:
            ended = self._take_one(step, tokens)
        else:
            places = tokens.reshape(len(rows), -1) if len(rows) else tokens[:, None]
            if step.gains is not None:
                ended = self._take_steps(step, places, counts, step.gains)
            else:
                ended = self._take_several(step, places, counts, num_computed)
        if self._leaving:
            for seq in [s for s in self._leaving if not self._in_flight[s.row]]:
                self._leaving.remove(seq)
                self._leave(seq)
        return ended

    def _take_one(self, step: ScheduledStep, tokens: np.ndarray) -> list[Sequence]:
        """tokens: [num_rows]. Returns the sequences that have ended."""
        rows = step.sampled_rows
        ended = self._end_failed(step, tokens) if np.count_nonzero(tokens < 0) else []
        self._last[rows] = tokens
        if self.steps > 1:
            self._recent[rows, 0], self._num_recent[rows] = tokens, 1
        for seq, token in zip(step.sampled, tokens.tolist(), strict=True):
            if seq.finish_reason is None:
                seq.output_ids.append(token)
        done = (self.length[rows] - self.unknown[rows] >= self._limit[rows]) | self._own_stops[rows]
        stopped = self._ends_at_eos[rows]
        if np.count_nonzero(stopped):
            stopped &= (tokens[:, None] == self._eos).any(1)
        for i in np.flatnonzero(done | stopped).tolist():
            seq = step.sampled[i]
            reason = self.ending(seq) if seq.finish_reason is None else None
            if reason is not None:
                self.finish(seq, reason)
                ended.append(seq)
        return ended

    def _take_steps(self, step: ScheduledStep, tokens: np.ndarray, counts: np.ndarray,
                    gains: np.ndarray) -> list[Sequence]:
        """tokens: [num_rows, width]; counts, gains: [num_rows]. Returns the sequences that have ended. The sequences
        count as longer by `gains` since the step was issued."""
        rows, ended = step.sampled_rows, list[Sequence]()
        look = (counts < gains) | (self.length[rows] - self.unknown[rows] >= self._limit[rows]) | self._own_stops[rows]
        known, ends = tokens, tokens < 0
        if np.count_nonzero(ends):
            look |= ends.any(1)
            known = np.maximum(tokens, 0)
        self._last[rows] = known[np.arange(len(rows)), counts - 1]
        self._recent[rows, :known.shape[1]], self._num_recent[rows] = known, counts
        at_eos = self._ends_at_eos[rows]
        for token in self._eos.tolist() if np.count_nonzero(at_eos) else ():
            ends = tokens == token
            if np.count_nonzero(ends):
                look |= at_eos & ends.any(1)
        failed = np.zeros(len(rows), np.int64)
        of_rows = tokens.tolist()
        if np.count_nonzero(counts != tokens.shape[1]):
            of_rows = [of_row[:count] for of_row, count in zip(of_rows, counts.tolist(), strict=True)]
        for i, (seq, of_row, close) in enumerate(zip(step.sampled, of_rows, look.tolist(), strict=True)):
            if seq.finish_reason is not None:
                continue
            if not close:
                seq.output_ids += of_row
                continue
            gained, reason = self._append_until_end(seq, of_row)
            if reason == "error":
                failed[i] = -1
            elif reason is not None:
                self.finish(seq, reason)
                ended.append(seq)
            elif gained < gains[i]:
                raise StateError("a device stopped a sequence that has not ended", got=f"request {seq.request_id}: "
                                 f"{gained} tokens", expected=f"{gains[i]} tokens",
                                 hint="a runner of several steps stops a row at its stop_ids and max_new alone")
        return (self._end_failed(step, failed) if failed.any() else []) + ended

    def _append_until_end(self, seq: Sequence, tokens: list[int]) -> tuple[int, FinishReason | None]:
        """Give a sequence its new tokens up to the one that ends it. Returns how many it gained, and why it ended."""
        for gained, token in enumerate(tokens):
            if token < 0:
                return gained, "error"
            seq.output_ids.append(token)
            reason = self.ending(seq)
            if reason is not None:
                return gained + 1, reason
        return len(tokens), None

    def _take_several(self, step: ScheduledStep, tokens: np.ndarray, counts: np.ndarray,
                      num_computed: np.ndarray | None) -> list[Sequence]:
        """tokens: [num_rows, width]; counts, num_computed: [num_rows]. Returns the sequences that have ended."""
        self._several = True
        self._num_recent[step.sampled_rows] = 0
        failed, ended = np.zeros(len(tokens), np.int64), list[Sequence]()
        for i, (seq, count) in enumerate(zip(step.sampled, counts.tolist(), strict=True)):
            if seq.finish_reason is not None:
                continue
            row = seq.row
            gained, reason = self._append_until_end(seq, tokens[i, :count].tolist())
            if row in step.drafts:
                seq.drafted += step.drafts[row]
                seq.accepted += min(count - 1, gained)
            self.length[row] += gained - 1  # the step was issued as if each sequence gained one token
            if gained:
                self._last[row] = seq.output_ids[-1]
            if reason == "error":
                failed[i] = -1
            elif reason is not None:
                self.finish(seq, reason)
                ended.append(seq)
            elif num_computed is not None:
                self.computed[row] += min(int(num_computed[i]), gained - 1)
        return (self._end_failed(step, failed) if failed.any() else []) + ended

    def _end_failed(self, step: ScheduledStep, tokens: np.ndarray) -> list[Sequence]:
        """End the sequences that got no token, and set their tokens to 0, since a later request may still append them.
        The keys and values of such a sequence may be NaN in any block. Therefore the blocks of its prefix, and all
        blocks computed from them, leave the prefix cache. A sequence that still uses these blocks registers no further
        block: its user may abort it before its own logits show the NaN."""
        failed = [step.sampled[i] for i in np.flatnonzero(tokens < 0).tolist()]
        tokens[tokens < 0] = 0
        failed = [seq for seq in failed if seq.finish_reason is None]
        for root in {seq.hashes[0] for seq in failed if seq.hashes}:
            self.blocks.distrust(root)
            for other in self.running + [seq for seq in self.waiting if seq.host_blocks]:
                other.distrusted |= other.hashes[:1] == [root]
        for seq in failed:
            self.finish(seq, "error")
        return failed

    def _can_run(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows do not depend on a step in flight."""
        idle: np.ndarray = self._in_flight[rows] == 0
        if not self.ahead:
            return idle
        # Or the row is in flight, but its next step finds everything that it needs computed, or on the device.
        idle |= ((self.unknown[rows] == 0) | ~self._needs_tokens[rows]) & (self.length[rows] < self._limit[rows])
        return idle

    def _running_rows(self) -> np.ndarray:
        if self._order is None:
            self._order = np.array([s.row for s in self.running], np.intp)
        return self._order

    def _grow(self, decodes: np.ndarray) -> np.ndarray:
        """Give each decode the block that it may need, and a sequence that gained several tokens all that it needs.
        Returns the decodes that can run."""
        rows = decodes[self.length[decodes] > self.capacity[decodes]]
        if len(rows):
            missing = self._missing(rows) if self._several else np.ones(len(rows), np.int64)
            if sum(missing.tolist()) > self.blocks.num_free:
                decodes = self._make_room(decodes)
                rows = decodes[self.length[decodes] > self.capacity[decodes]]
                missing = missing[:len(rows)] if not self._several else self._missing(rows)
            self._give(rows, missing)
        return decodes

    def _missing(self, rows: np.ndarray, more: np.ndarray | int = 0) -> np.ndarray:
        """How many blocks rows lack for the tokens that they have and `more`; 0 or less where they lack none."""
        blocks: np.ndarray = -((self.capacity[rows] - self.length[rows] - more) // self.block_size)
        return blocks

    def _give(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Give rows further blocks. counts: how many each row gets; there are enough."""
        given, grown, at = self.blocks.take(sum(counts.tolist())), self._changes.grown, self._at
        self.capacity[rows] += counts * self.block_size
        each = rows if len(given) == len(rows) else np.repeat(rows, counts)
        for row, block in zip(each.tolist(), given, strict=True):
            seq = at[row]
            assert seq is not None
            grown.append((row, len(seq.blocks), block))
            seq.blocks.append(block)

    def _look_ahead(self, decodes: np.ndarray) -> np.ndarray | None:
        """Give decodes the blocks for several steps, as many as there are blocks for without preempting anybody.
        Returns how many tokens each of them gets, at least 1, or None where it is one each."""
        if np.count_nonzero(self._one_step[decodes]):
            return None
        steps, room = self.steps, self._limit[decodes] - self.length[decodes]
        while steps > 1:
            gains = np.minimum(room, steps)
            missing = self._missing(decodes, gains - 1)
            short = np.flatnonzero(missing > 0)
            if int(missing[short].sum()) <= self.blocks.num_free:
                break
            steps //= 2
        else:
            return None
        self._give(decodes[short], missing[short])
        return gains if int(gains.max()) > 1 else None

    def _grow_all(self, rows: np.ndarray, decodes: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_grow` for decodes and for the other rows together, the oldest first. Returns those of both that can run."""
        asking = rows[np.isin(rows, np.concatenate((decodes, more)))]
        kept = self._grow(asking)
        return decodes[np.isin(decodes, kept)], more[np.isin(more, kept)]

    def _make_room(self, decodes: np.ndarray) -> np.ndarray:
        """Preempt the youngest sequences until the older decodes have their blocks. Returns the decodes that can run.
        """
        kept, promised = [], 0
        for row in decodes.tolist():
            seq = self._at[row]
            if seq is None:  # preempted for an older one
                continue
            if self.length[row] > self.capacity[row]:
                missing = -(int(self.capacity[row] - self.length[row]) // self.block_size)
                while self.blocks.num_free < promised + missing:
                    victim = next((s for s in reversed(self.running) if not self._in_flight[s.row]), seq)
                    if victim.request_id <= seq.request_id:
                        break
                    self._preempt(victim)
                if self.blocks.num_free < promised + missing:
                    continue
                promised += missing
            kept.append(row)
        return np.array(kept, np.intp)

    def _preempt(self, seq: Sequence) -> None:
        computed = int(self.computed[seq.row])
        count = -(-computed // self.block_size)
        seq.preemptions += 1
        if 0 < count <= self.blocks.num_free_host and self._free_host_rows:
            seq.host_blocks = self.blocks.allocate_host(count)
            self._changes.swap_out += zip(seq.blocks[:count], seq.host_blocks, strict=True)
            if self.has_row_states:
                seq.host_row = self._free_host_rows.pop()
                self._changes.rows_out.append((seq.row, seq.host_row))
        self._leave(seq)
        seq.num_computed = computed if seq.host_blocks else 0
        insort(self.waiting, seq, key=_AGE)

    def _drop_host(self, seq: Sequence, *, unwritten_only: bool = False) -> None:
        """Free a swapped sequence's host blocks, and cancel the copies to them that no step has been told yet."""
        held, pending = set(seq.host_blocks), self._changes.swap_out
        unwritten = [pair for pair in pending if pair[1] in held]
        if unwritten or not unwritten_only:
            self._changes.swap_out = [pair for pair in pending if pair[1] not in held]
            self.blocks.release_host(seq.host_blocks)
            seq.host_blocks, seq.num_computed = [], 0
            if seq.host_row >= 0:
                self._changes.rows_out = [pair for pair in self._changes.rows_out if pair[1] != seq.host_row]
                self._free_host_rows.append(seq.host_row)
                seq.host_row = -1

    def _leave(self, seq: Sequence) -> None:
        """A running sequence gives up its row and its blocks."""
        row = seq.row
        seq.tokens_computed += int(self.computed[row]) - seq.num_computed
        self.blocks.release(seq.blocks)
        seq.blocks, seq.row, self._at[row] = [], -1, None
        self.running.remove(seq)
        self._order = None
        self._free_rows.append(row)
        self._changes.finished.append(row)

    def _enter(self, seq: Sequence, pinned: list[int]) -> bool:
        """Give a waiting sequence a row, and blocks for all its tokens: cached blocks of its prefix first. Returns
        False when there are not enough blocks. Appends to `pinned` the blocks to release when the step is issued."""
        blocks, size, length = self.blocks, self.block_size, len(seq)
        total, hits, source = -(-length // size), list[int](), list[int]()
        reserve = max(1, self.num_blocks // 100) if self.running else 0  # or it is preempted at once
        if not seq.host_blocks and self.prefix_caching and not seq.wants_prompt_logprobs:
            seq.extend_hashes(size, length // size)
            hits = blocks.match(seq.hashes)
            if len(hits) * size == length:  # its last token is computed again, in a copy, since others hold the block
                source = [hits.pop()]
        if total - len(hits) + blocks.num_idle(hits + source) > blocks.num_free - reserve:
            source = []  # no room for the block and its copy: compute the last block again
            if total - len(hits) + blocks.num_idle(hits) > blocks.num_free - reserve:
                return False
        blocks.share(hits + source)
        seq.blocks = hits + [blocks.allocate() for _ in range(total - len(hits))]
        changes = self._changes
        if seq.host_blocks:
            changes.swap_in += zip(seq.host_blocks, seq.blocks, strict=False)
            blocks.release_host(seq.host_blocks)
            registered = len(seq.host_blocks)
            seq.host_blocks = []
        else:
            registered = len(hits)
            seq.num_computed = length - 1 if source else registered * size
            changes.copies += zip(source, seq.blocks[registered:], strict=False)
            pinned += source
            if not seq.started:
                seq.num_cached = seq.num_computed
        seq.started = True
        del self.waiting[0]
        insort(self.running, seq, key=_AGE)
        self._order = None
        changes.entered.append(seq)
        row = seq.row = self._free_rows.pop()
        if seq.host_row >= 0:
            changes.rows_in.append((seq.host_row, row))
            self._free_host_rows.append(seq.host_row)
            seq.host_row = -1
        self._at[row] = seq
        self.length[row] = self._told[row] = length
        self.computed[row], self.capacity[row], self._limit[row] = seq.num_computed, total * size, seq.limit
        self._registered[row] = registered
        self._ends_at_eos[row] = not seq.params.ignore_eos
        self._own_stops[row] = bool(seq.params.stop_token_ids)
        self._needs_tokens[row] = seq.needs_tokens or needs_tokens(seq.params)
        self._known[row] = length
        if self.steps > 1:
            ids = (*seq.params.stop_token_ids, *(() if seq.params.ignore_eos else self._eos.tolist()))
            self._one_step[row] = seq.needs_tokens or seq.constraint is not None or len(ids) > STOP_IDS
            self._stop_ids[row] = -1
            if not self._one_step[row]:
                self._stop_ids[row, :len(ids)] = ids
        self._asks_prompt[row] = seq.wants_prompt_logprobs
        return True

    def _drafts(self, decodes: np.ndarray, budget: int) -> dict[int, list[int]]:
        """The drafts that this step verifies, by row: of the decodes, within `budget` tokens. Drafts that need a block
        get it only where every running sequence may still take one."""
        taken: dict[int, list[int]] = {}
        for row in decodes.tolist():
            seq = self._at[row]
            assert seq is not None
            length = int(self.length[row])
            # With all drafts accepted, the sequence gains one token more.
            drafts = seq.drafts[:max(min(budget, seq.limit - length - 1), 0)]
            seq.drafts = []
            while length + len(drafts) > self.capacity[row] and self.blocks.num_free > len(self.running):
                block = self.blocks.allocate()
                self._changes.grown.append((row, len(seq.blocks), block))
                seq.blocks.append(block)
                self.capacity[row] += self.block_size
            drafts = drafts[:max(int(self.capacity[row]) - length, 0)]
            if drafts:
                taken[row], budget = drafts, budget - len(drafts)
        return taken

    def _issue(self, decodes: np.ndarray, chunks: list[tuple[int, int]], drafts: dict[int, list[int]],
               gains: np.ndarray | None) -> ScheduledStep:
        """The step of these decodes and of these (row, number of tokens); it counts as computed from here on. `drafts`:
        by row, of decodes. `gains`: the tokens that each of the decodes gets, where that is not one."""
        rows, counts, total, prefill = decodes, np.ones(len(decodes), np.int64), len(decodes), 0
        if chunks or drafts:
            more = np.array(chunks, np.int64).reshape(-1, 2)
            done = self.computed[more[:, 0]]  # behind the tokens with which a sequence entered come sampled ones
            prefill = int((np.minimum(done + more[:, 1], self._known[more[:, 0]]) - done).clip(0).sum())
            rows, counts = np.concatenate([rows, more[:, 0]]), np.concatenate([counts, more[:, 1]])
            extra = np.array([len(drafts.get(row, ())) for row in rows.tolist()], np.int64)
            counts += extra
            order = np.argsort(counts != 1, kind="stable")
            rows, counts, extra, total = rows[order], counts[order], extra[order], counts.sum()
        computed = self.computed[rows]
        ends = computed + counts
        if self._issued is not None:
            self.digest = self._issued.chain()  # not before: its drafts may have been on their way when it was issued
        values: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "digest": self.digest}
        if drafts:
            ends -= extra
            tokens = [token for row in rows.tolist() for token in drafts.get(row, ())]
            values |= {"draft_counts": extra.astype(np.int32), "draft_tokens": np.array(tokens, np.int32)}
        sampled = rows[ends == self.length[rows]]
        changes, self._changes = self._changes, Changes()
        if gains is not None:
            values |= {"num_steps": int(gains.max()), "max_new": gains.astype(np.int32),
                       "stop_ids": self._stop_ids[rows]}
            ends, total = ends + gains - 1, int(gains.sum())
        request = changes.request(rows, counts, computed, *self._tell_appended(rows), **values)
        self.step, self._issued = self.step + 1, request
        self._count_as_computed(rows, ends, sampled, 1 if gains is None else gains)
        if self.prefix_caching:
            self._register(rows, ends)
        targets = self._prompt_targets(rows, computed, ends) if np.count_nonzero(self._asks_prompt[rows]) else []
        at = self._at
        sequences: list[Any] = [at[row] for row in sampled.tolist()]
        return ScheduledStep(request, rows, sampled, sequences, gains, targets, int(total), prefill,
                             {row: len(tokens) for row, tokens in drafts.items()})

    def _tell_appended(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Rows that gained tokens of which the ranks are told with the step of `rows`, these tokens, and how many each
        row has (None: one each). A token that is still on the device is told only where the step needs it."""
        running, unknown = self._running_rows(), self.unknown
        tellable = unknown == 0
        tellable[rows] = True
        appended = running[(self.length[running] > self._told[running]) & tellable[running]]
        tokens, counts = np.where(unknown[appended] > 0, PENDING_TOKEN, self._last[appended]), None
        if self._several or self.steps > 1:
            tokens, counts = self._gained(appended, tokens)
        self._told[appended] = self.length[appended]
        return appended, tokens, counts

    def _gained(self, rows: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The tokens that ranks have not been told of, row after row, and how many each row has; None: one each."""
        counts = self.length[rows] - self._told[rows]
        if (counts == 1).all():
            return last, None
        unknown, most = self.unknown[rows], self._recent.shape[1]
        pending = unknown > 0
        if most and not np.count_nonzero(np.where(pending, unknown, self._num_recent[rows]) != counts):
            # The ranks lack what each row gained last, and nothing before it.
            gained = self._recent[rows]
            gained[pending] = PENDING_TOKEN
            whole = not np.count_nonzero(counts != most)
            return gained.ravel() if whole else gained[np.arange(most) < counts[:, None]], counts
        tokens = list[int]()
        for row, count, still in zip(rows.tolist(), counts.tolist(), unknown.tolist(), strict=True):
            seq = self._at[row]
            assert seq is not None
            if count > still:
                tokens += seq.output_ids[still - count:]
            tokens += [PENDING_TOKEN] * still
        return np.array(tokens, np.int64), counts

    def _count_as_computed(self, rows: np.ndarray, ends: np.ndarray, sampled: np.ndarray,
                           gains: np.ndarray | int) -> None:
        self.computed[rows] = ends
        self.length[sampled] += gains
        self.unknown[sampled] += gains
        self._in_flight[rows] += 1
        self._num_in_flight += len(rows)

    def _prompt_targets(self, rows: np.ndarray, computed: np.ndarray, ends: np.ndarray,
                        ) -> list[tuple[Sequence, int, int]]:
        """See ScheduledStep.prompt_targets."""
        targets = []
        for row, first, end in zip(rows.tolist(), computed.tolist(), ends.tolist(), strict=True):
            seq = self._at[row]
            assert seq is not None
            if seq.wants_prompt_logprobs and first + 1 < len(seq.prompt_ids):
                targets.append((seq, first + 1, min(end + 1, len(seq.prompt_ids))))
        return targets

    def _register(self, rows: np.ndarray, ends: np.ndarray) -> None:
        """Make blocks that this step fills with known tokens findable by later steps."""
        full = np.minimum(ends, self.length[rows] - self.unknown[rows]) // self.block_size
        registered = self._registered[rows]
        filled = np.flatnonzero(full > registered)
        for row, before, count in zip(rows[filled].tolist(), registered[filled].tolist(), full[filled].tolist(),
                                      strict=True):
            seq = self._at[row]
            assert seq is not None
            seq.extend_hashes(self.block_size, count)
            if not seq.distrusted:
                for column in range(before, count):
                    self.blocks.register(seq.blocks[column], seq.hashes[column], seq.hashes[0])
        self._registered[rows[filled]] = full[filled]
