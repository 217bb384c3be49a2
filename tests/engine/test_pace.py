"""Chunks of prompts that keep a target of inter-token latency, on a device whose time is simulated."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hal import LLM, SamplingParams
from hal.config import EngineConfig
from hal.engine.pace import Pace
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.errors import ConfigError

BLOCK, BUDGET, ROWS = 16, 512, 16


@dataclass
class Device:
    """A scheduler above a device whose steps take `step` + `decode` * decodes + `token` * prompt tokens seconds, with
    `noise` as a share of it, and a pause of `pause` seconds in one step of 50.

    Attributes:
        mixed: of each step with decodes its decodes, its prompt tokens, those that it could have taken, its seconds
            without noise and pauses, and its seconds.
    """

    target_ms: float | None
    step: float = 0.004
    decode: float = 0.0001
    token: float = 0.0001
    noise: float = 0.0
    pause: float = 0.0
    ahead: bool = False
    now: float = 0.0
    mixed: list[tuple[int, int, int, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = EngineConfig(block_size=BLOCK, max_num_seqs=ROWS, max_num_batched_tokens=BUDGET,
                              itl_target_ms=self.target_ms, prefix_caching=False)
        self.scheduler = Scheduler(config, 2000, ahead=self.ahead, clock=lambda: self.now)
        self.draw, self.numbers = random.Random(0), 0
        self.pending: deque[tuple[Any, float]] = deque()

    def add(self, prompt: int, new: int) -> None:
        self.scheduler.add(Sequence(request_id=self.numbers, prompt_ids=[5] * prompt, seed=0, limit=prompt + new,
                                    params=SamplingParams(max_tokens=new, ignore_eos=True)))
        self.numbers += 1

    def turn(self) -> None:
        waits = sum(len(s.prompt_ids) for s in self.scheduler.waiting) + sum(
            max(len(s.prompt_ids) - int(self.scheduler.computed[s.row]), 0) for s in self.scheduler.running)
        issued = self.scheduler.schedule()
        if issued is not None:
            decodes = issued.num_tokens - issued.num_prefill
            mean = self.step + self.decode * decodes + self.token * issued.num_prefill
            seconds = mean * (1 + self.noise * self.draw.uniform(-1, 1)) + self.pause * (self.draw.random() < 0.02)
            if decodes:
                self.mixed.append((decodes, issued.num_prefill, waits, mean, seconds))
            self.pending.append((issued, seconds))
        if issued is None or len(self.pending) > self.ahead:
            done, seconds = self.pending.popleft()
            self.now += seconds
            self.scheduler.update(done, np.full(len(done.sampled), 7))

    def run(self, arrivals: int, gap: float, prompt: int = 200, new: int = 60) -> None:
        """Requests arrive at exponential gaps until so many have come, and all end."""
        due = self.now
        for _ in range(arrivals):
            due += self.draw.expovariate(1 / gap)
            while self.now < due and self.scheduler.unfinished:
                self.turn()
            self.now = max(self.now, due)
            self.add(prompt, new)
        while self.scheduler.unfinished or self.pending:
            self.turn()


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(step=st.floats(0.0005, 0.02), decode=st.floats(0, 0.0003), token=st.floats(2e-6, 0.0005),
       noise=st.sampled_from((0.0, 0.05, 0.2)), pause=st.sampled_from((0.0, 0.3)), room=st.floats(1.2, 4.0),
       arrivals=st.sampled_from((0.03, 0.15, 0.5)), seed=st.integers(0, 99))
def test_the_target_holds_where_it_can_be_held_and_its_room_is_used(
        step: float, decode: float, token: float, noise: float, pause: float, room: float, arrivals: float,
        seed: int) -> None:
    """Of steps with 1 to 16 decodes, with prompts of 200 tokens that arrive in a share of the steps."""
    draw, now, target = random.Random(seed), 0.0, room * (step + decode * ROWS + token * BLOCK)
    pace, decodes, waits, over, used, could = Pace(target, BLOCK, lambda: now), 8, 0, 0, 0, 0.0
    for i in range(400):
        decodes = min(max(decodes + draw.choice((-1, 0, 1)), 1), ROWS)
        waits += 200 * (draw.random() < arrivals)
        tokens = min(pace.most(decodes), waits, BUDGET)
        mean = step + decode * decodes + token * tokens
        pace.begin(decodes, tokens)
        now += mean * (1 + noise * draw.uniform(-1, 1)) + pause * (draw.random() < 0.02)
        pace.end()
        if i >= 100:
            over += tokens > BLOCK and mean * (1 + noise / 2) > 1.02 * target
            if waits:
                used += tokens
                could += min(waits, max((target / (1 + 2 * noise) - step - decode * decodes) / token, BLOCK), BUDGET)
        waits -= tokens
    assert over <= 300 * 0.03
    assert pause or could < 3000 or used > 0.6 * could


def test_a_chunk_at_most_doubles_and_a_step_is_not_charged_for_the_one_before_it() -> None:
    now = 0.0
    pace = Pace(0.010, BLOCK, lambda: now)
    found = []
    pace.begin(4, 0)
    for _ in range(40):
        found.append(pace.most(4))
        pace.begin(4, found[-1])  # ahead: before the step before has ended
        now += 0.004 + 0.00001 * found[-2] if len(found) > 1 else 0.004
        pace.end()
    assert all(b <= 2 * a for a, b in pairwise(found)) and found[:3] == [16, 16, 32]
    assert 400 < found[-1] <= 600  # of 600


@pytest.mark.parametrize(("options", "ahead"), [
    ({}, False), ({"noise": 0.2, "pause": 0.1}, False), ({"token": 0.00001, "noise": 0.1}, True)])
def test_a_scheduler_keeps_the_target(options: dict[str, float], ahead: bool) -> None:
    device = Device(12.0, ahead=ahead, **options)
    device.run(40, gap=0.1)
    known = device.mixed[len(device.mixed) // 4:]
    assert sum(mean > 0.01205 for *_, mean, _ in known) <= len(known) * 0.02
    assert max(tokens for _, tokens, *_ in known) > (40 if device.token > 0.00001 else 190)
    free = Device(None, ahead=ahead, **options)
    free.run(40, gap=0.1)
    assert max(mean for *_, mean, _ in free.mixed) > 0.02 or device.token < 0.0001


@pytest.mark.parametrize("ahead", [False, True])
def test_a_target_that_cannot_be_held_starves_no_prompt(ahead: bool) -> None:
    device = Device(1.0, ahead=ahead)  # a step alone takes 4 ms
    device.run(20, gap=0.05)
    assert all(tokens >= min(waits, BLOCK) for _, tokens, waits, _, _ in device.mixed)
    assert {tokens for _, tokens, waits, _, _ in device.mixed[20:] if waits >= BLOCK} == {BLOCK}


def test_a_lasting_change_of_speed_is_learnt_and_a_pause_is_not() -> None:
    device = Device(20.0)
    device.run(40, gap=0.05)
    device.step, device.token, before = 0.008, 0.0003, len(device.mixed)
    device.run(40, gap=0.05)
    slower = device.mixed[before:]
    assert max(mean for *_, mean, _ in slower[:20]) > 0.021  # it could not be known
    assert all(mean < 0.021 for *_, mean, _ in slower[60:])
    usual = np.mean([tokens for _, tokens, waits, *_ in slower[60:] if waits > 60])
    device.now += 3600  # idle, which is no step's time
    before = len(device.mixed)
    device.run(20, gap=0.05)
    assert np.mean([tokens for _, tokens, waits, *_ in device.mixed[before:] if waits > 60]) > 0.8 * usual


def test_prompts_alone_are_not_bounded_and_the_same_times_give_the_same_steps() -> None:
    alone = Device(5.0)
    alone.add(2000, 1)
    alone.turn()
    assert alone.now == pytest.approx(0.004 + BUDGET * 0.0001)
    found = []
    for target in (6.0, 6.0, None):
        device = Device(target, noise=0.2, pause=0.1)
        device.run(20, gap=0.05)
        found.append(device.mixed)
    assert found[0] == found[1] != found[2]
    assert max(tokens for _, tokens, *_ in found[2]) > 300 > max(tokens for _, tokens, *_ in found[0])


def test_an_engine_with_a_target_gives_the_same_tokens() -> None:
    found = []
    for options in ({}, {"itl_target_ms": 1e-3}, {"itl_target_ms": 50, "async_scheduling": True}):
        with LLM(device="null", num_blocks=200, block_size=4, max_model_len=64, **options) as llm:
            outputs = llm.generate([[5 + i % 4] * (3 + 5 * (i % 9)) for i in range(20)], SamplingParams(max_tokens=12))
            found.append([output.token_ids for output in outputs])
            paced = llm.scheduler._pace
            assert paced is None or not paced._begun or options.get("async_scheduling")
    assert found[0] == found[1] == found[2]


def test_where_one_scheduler_does_not_time_whole_steps_a_target_is_refused() -> None:
    for options in ({"pp": 2}, {"wire": "none"}):
        with pytest.raises(ConfigError, match="itl_target_ms bounds steps"):
            EngineConfig(itl_target_ms=10, **options)  # type: ignore[arg-type]
    for bad in (0, -1, "10", float("nan")):
        with pytest.raises(ConfigError, match="itl_target_ms is not usable"):
            EngineConfig(itl_target_ms=bad)  # type: ignore[arg-type]
