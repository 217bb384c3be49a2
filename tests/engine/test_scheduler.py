"""The scheduler through the real in-process executor, on the null backend, whose tokens tell of every wrong block. The
executor's batch state follows the diffs, and checks their chain of digests."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.config import EngineConfig
from hal.contracts import backend as backends
from hal.contracts.executor import StepHandle, make_executor
from hal.engine.scheduled_step import ScheduledStep
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence, derive_seed
from hal.errors import CapacityError, StateError
from hal.model_config import ModelConfig
from hal.sampling.params import SamplingParams

MODEL = ModelConfig(family="llama", architecture="Null", vocab_size=97, hidden_size=8, num_layers=2, num_heads=2,
                    num_kv_heads=2, head_dim=4, intermediate_size=8, max_position=64, dtype="float32")
EOS, ROWS, SIZE = 3, 4, 4


def next_token(tokens: list[int]) -> int:
    """What hal.testing.null documents, in Python."""
    return sum((t + 7) * (place * 31 + layer + 11) % 65521 for layer in range(MODEL.num_layers)
               for place, t in enumerate(tokens)) % (1 << 31) % MODEL.vocab_size


def expected(prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
    tokens = list(prompt)
    limit = min(len(prompt) + params.max_tokens, MODEL.max_position)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] in params.stop_token_ids or (tokens[-1] == EOS and not params.ignore_eos):
            return tokens, "stop"
        if len(tokens) == limit:
            return tokens, "length"


def make(number: int, prompt: list[int], **params: Any) -> Sequence:
    chosen = SamplingParams(**params)
    return Sequence(request_id=number, prompt_ids=list(prompt), params=chosen, seed=number,
                    limit=min(len(prompt) + chosen.max_tokens, MODEL.max_position))


@dataclass
class Rig:
    """An engine's loop in a few lines, which looks at the scheduler after every call.

    Attributes:
        failures: by request id, the output token for which its logits have no finite maximum.
        states, host_states: by row what layers with a state per row would keep: (request id, tokens computed).
    """

    config: EngineConfig
    num_blocks: int
    depth: int
    failures: dict[int, int] = field(default_factory=dict)
    has_row_states: bool = False
    states: dict[int, tuple[int, int]] = field(default_factory=dict)
    host_states: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ahead = bool(self.config.async_scheduling)
        self.executor = make_executor(self.config, MODEL, backends.load("hal.testing.null:backend"))
        self.scheduler = Scheduler(self.config, self.num_blocks, self.config.num_cpu_blocks, eos_token_ids=(EOS,),
                                   depth=self.depth, ahead=self.ahead, has_row_states=self.has_row_states)
        self.pending: deque[tuple[ScheduledStep, StepHandle]] = deque()
        self.steps = 0

    def turn(self) -> ScheduledStep | None:
        step = self.scheduler.schedule()
        self.look()
        assert step is not None or self.pending, "requests wait, and none can run"
        if step is not None:
            self.steps += 1
            assert 0 < step.num_tokens <= self.config.max_num_batched_tokens and len(step.rows) <= ROWS
            self.keep_states(step)
            self.pending.append((step, self.executor.execute_model(step.request)))
        if step is None or len(self.pending) >= (2 if self.ahead else self.depth):
            done, handle = self.pending.popleft()
            tokens = handle.result().token_ids.numpy().copy()
            for i, seq in enumerate(done.sampled):
                if self.failures.get(seq.request_id) == len(seq.output_ids):
                    tokens[i] = -1
            self.scheduler.update(done, tokens)
            self.look()
        return step

    def keep_states(self, step: ScheduledStep) -> None:
        """Each sequence finds the state that its own last step left, or begins with its first token."""
        r = step.request
        leaving = [] if r.rows_to_swap_out is None else [(to, self.states[row]) for row, to in r.rows_to_swap_out]
        for source, row in () if r.rows_to_swap_in is None else r.rows_to_swap_in.tolist():
            self.states[row] = self.host_states.pop(source)
        self.host_states |= leaving
        assert self.has_row_states or not (self.states or leaving)
        numbers = zip(r.rows.tolist(), r.num_computed.tolist(), r.num_scheduled.tolist(), strict=True)
        for row, computed, count in numbers:
            seq = self.scheduler._at[row]
            if self.has_row_states and seq is not None:
                assert computed == 0 or self.states[row] == (seq.request_id, computed)
                self.states[row] = seq.request_id, computed + count

    def drain(self) -> None:
        while self.scheduler.unfinished or self.pending:
            self.turn()
            assert self.steps < 3000, "no progress"

    def look(self) -> None:
        s = self.scheduler
        blocks = Counter(b for seq in s.running for b in seq.blocks)
        assert s.blocks.refs == [blocks[b] for b in range(self.num_blocks)] and not blocks[0]
        assert s.blocks.num_free == self.num_blocks - 1 - len(blocks)
        host = [b for seq in s.waiting for b in seq.host_blocks]
        assert len(set(host)) == len(host) == self.config.num_cpu_blocks - s.blocks.num_free_host
        host_rows = [seq.host_row for seq in s.waiting if seq.host_row >= 0]
        assert sorted([*host_rows, *s._free_host_rows]) == list(range(ROWS))
        assert len(host_rows) == (sum(bool(seq.host_blocks) for seq in s.waiting) if self.has_row_states else 0)
        rows = [seq.row for seq in s.running]
        assert sorted([*rows, *s._free_rows]) == list(range(ROWS)) and all(s._at[q.row] is q for q in s.running)
        for group in (s.running, s.waiting):
            assert [q.request_id for q in group] == sorted(q.request_id for q in group)
        for seq in s.running:
            assert s.computed[seq.row] <= s.capacity[seq.row] == len(seq.blocks) * SIZE
            assert s.length[seq.row] - s.unknown[seq.row] == len(seq.token_ids) or seq.finish_reason is not None
        for seq in s.waiting:
            assert seq.row == -1 and not seq.blocks and seq.finish_reason is None

    def is_clean(self) -> bool:
        s = self.scheduler
        return not (any(s.blocks.refs) or s.running or s.waiting or s._leaving or s._num_in_flight or s._in_flight.any()
                    or s.unknown.any()) and s.blocks.num_free == self.num_blocks - 1 and len(s._free_rows) == ROWS \
            and s.blocks.num_free_host == self.config.num_cpu_blocks


def rig(num_blocks: int, depth: int = 1, has_row_states: bool = False, **options: Any) -> Rig:
    options = {"block_size": SIZE, "max_num_seqs": ROWS, "max_num_batched_tokens": 64, "num_blocks": 64,
               "max_model_len": 64, "device": "hal.testing.null:backend", "async_scheduling": False, **options}
    return Rig(EngineConfig(**options), num_blocks, depth, has_row_states=has_row_states)


# (steps after the one before, which common prefix, its length, own tokens, new tokens, kind of params)
ARRIVAL = st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 20), st.integers(1, 12), st.integers(1, 20),
                    st.integers(0, 2))


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.lists(ARRIVAL, min_size=1, max_size=9), st.integers(14, 40), st.sampled_from((0, 5, 30)),
       st.sampled_from((1, 3, 7, 64)), st.sampled_from((1, 2, "ahead")), st.booleans(),
       st.dictionaries(st.integers(1, 30), st.integers(0, 8), max_size=4),
       st.dictionaries(st.integers(0, 8), st.integers(0, 19), max_size=4), st.booleans())
def test_every_sequence_gets_its_tokens(
        arrivals: list[tuple[int, int, int, int, int, int]], num_blocks: int, host: int, budget: int,
        depth: int | str, caching: bool, aborts: dict[int, int], failures: dict[int, int], states: bool) -> None:
    r = rig(num_blocks, 2 if depth == 2 else 1, num_cpu_blocks=host, max_num_batched_tokens=budget,
            prefix_caching=caching, async_scheduling=depth == "ahead", has_row_states=states)
    r.failures = failures
    common = np.random.default_rng(7).integers(4, 97, (2, 20)).tolist()
    coming: deque[tuple[int, Sequence]] = deque()
    seqs, when = [], 0
    for i, (gap, which, shared, own, new, kind) in enumerate(arrivals):
        prompt = common[which][:shared] + [4 + (i * 11 + k) % 90 for k in range(own)]
        params: dict[str, Any] = [{}, {"ignore_eos": True}, {"stop_token_ids": tuple(range(50, 60))}][kind]
        seqs.append(make(i, prompt, max_tokens=new, **params))
        when += gap
        coming.append((when, seqs[-1]))
    turns = 0
    while coming or r.scheduler.unfinished or r.pending:
        while coming and (coming[0][0] <= turns or not (r.scheduler.unfinished or r.pending)):
            r.scheduler.add(coming.popleft()[1])
        if turns in aborts and aborts[turns] < len(seqs) - len(coming):
            r.scheduler.finish(seqs[aborts[turns]], "abort")
            r.look()
        if r.scheduler.unfinished or r.pending:
            r.turn()
        turns += 1
        assert turns < 3000
    r.executor.shutdown()
    for seq in seqs:
        tokens, reason = expected(seq.prompt_ids, seq.params)
        if seq.finish_reason == "abort":
            assert seq.token_ids == tokens[:len(seq.token_ids)]
        elif failures.get(seq.request_id, 99) < len(tokens) - len(seq.prompt_ids):
            end = len(seq.prompt_ids) + failures[seq.request_id]
            assert (seq.token_ids, seq.finish_reason) == (tokens[:end], "error")
        else:
            assert (seq.token_ids, seq.finish_reason) == (tokens, reason)
    assert r.is_clean()


@pytest.mark.parametrize(("host", "swapped"), [(40, True), (0, False)])
@pytest.mark.parametrize("ahead", [False, True])
def test_preemption_happens_and_changes_nothing(host: int, swapped: bool, ahead: bool) -> None:
    r = rig(12, num_cpu_blocks=host, prefix_caching=False, async_scheduling=ahead)
    seqs = [make(i, [10 + i] * 8, max_tokens=20, ignore_eos=True) for i in range(4)]
    for seq in seqs:
        r.scheduler.add(seq)
    moved = 0
    while r.scheduler.unfinished or r.pending:
        step = r.turn()
        if step is not None and step.request.blocks_to_swap_in is not None:
            moved += len(step.request.blocks_to_swap_in)
    r.executor.shutdown()
    assert seqs[0].preemptions == 0 < sum(s.preemptions for s in seqs)  # the oldest stays
    assert bool(moved) == swapped
    computed = sum(s.tokens_computed for s in seqs)
    needed = sum(len(s.token_ids) - 1 for s in seqs)  # the last token's own cache entry is not needed
    assert computed == needed if swapped else computed > needed
    assert [s.token_ids for s in seqs] == [expected(s.token_ids[:8], s.params)[0] for s in seqs] and r.is_clean()


@pytest.mark.parametrize(("shared", "cached"), [(7, 4), (8, 7), (3, 0)])
def test_a_prefix_is_computed_once(shared: int, cached: int) -> None:
    """The last prompt token is always computed: with all of its block in the cache, in a copy of that block."""
    r, prompt = rig(40), [5, 6, 7, 8, 9, 10, 11, 12]
    first, second = make(0, prompt, max_tokens=3), make(1, prompt[:shared], max_tokens=5)
    r.scheduler.add(first)
    r.drain()
    r.scheduler.add(second)
    step = r.turn()
    assert step is not None and (second.num_cached, step.num_tokens) == (cached, shared - cached)
    r.drain()
    r.executor.shutdown()
    assert second.token_ids == expected(prompt[:shared], second.params)[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_of_a_failed_sequence_leave_the_prefix_cache(ahead: bool) -> None:
    """All of them, whichever sequence computed them and in whichever step; and what was computed from them, also by a
    sequence that is aborted before its own logits fail. Another prefix stays."""
    r, prompt = rig(60, max_num_batched_tokens=8, async_scheduling=ahead), list(range(5, 17))
    other, first = make(0, [50] * 12, max_tokens=2, ignore_eos=True), make(1, prompt, max_tokens=30, ignore_eos=True)
    r.scheduler.add(other)
    r.drain()
    r.scheduler.add(first)
    while len(first.output_ids) < 6:
        r.turn()
    second = make(2, [*prompt, *range(60, 90)], max_tokens=5, ignore_eos=True)
    r.scheduler.add(second)
    r.turn()
    assert second.num_cached == 12  # of the first, with which it goes on
    r.failures = {1: 8}
    while first.finish_reason is None:
        r.turn()
    assert first.finish_reason == "error" and len(first.output_ids) == 8 and second.finish_reason is None
    r.turn()
    r.scheduler.finish(second, "abort")
    r.drain()
    again = [make(3, first.token_ids, max_tokens=2, ignore_eos=True), make(4, second.prompt_ids, max_tokens=2),
             make(5, [50] * 12, max_tokens=2, ignore_eos=True)]
    for seq in again:
        r.scheduler.add(seq)
        r.drain()
    r.executor.shutdown()
    assert [seq.num_cached for seq in again] == [0, 12, 11]  # 12: of the request before, which computed them anew
    assert [seq.token_ids for seq in again[:2]] == [expected(s.prompt_ids, s.params)[0] for s in again[:2]]


def test_a_long_prompt_does_not_hold_up_decodes() -> None:
    r = rig(40, max_num_batched_tokens=8)
    early, late = make(0, [9, 9], max_tokens=12, ignore_eos=True), make(1, [8] * 30, max_tokens=2, ignore_eos=True)
    r.scheduler.add(early)
    r.turn()
    r.scheduler.add(late)
    before = len(early.token_ids)
    chunks = []
    while not late.output_ids:
        step = r.turn()
        assert step is not None
        chunks.append(step.num_prefill)
    r.drain()
    r.executor.shutdown()
    assert chunks == [7, 7, 7, 7, 2] and before + 5 <= len(early.token_ids)


def test_a_request_that_can_never_run_is_refused() -> None:
    scheduler = Scheduler(EngineConfig(block_size=SIZE), 5)
    scheduler.check(16, 17)  # the last token's cache entry is never needed
    with pytest.raises(CapacityError, match="too small for one request"):
        scheduler.check(16, 18)
    with pytest.raises(CapacityError):
        scheduler.add(make(0, [5] * 17, max_tokens=1))
    assert not scheduler.unfinished


def test_an_output_of_the_wrong_size_is_refused() -> None:
    scheduler = Scheduler(EngineConfig(block_size=SIZE), 9)
    scheduler.add(make(0, [5, 6], max_tokens=4))
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(StateError, match="does not fit"):
        scheduler.update(step, np.zeros(2, np.int32))


def test_derived_seeds_differ_and_stay() -> None:
    seeds = [derive_seed(engine, request) for engine in range(3) for request in range(50)]
    assert len(set(seeds)) == 150 and all(-(2**63) <= s < 2**63 for s in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
