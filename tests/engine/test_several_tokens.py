"""A step may give a sequence several tokens: requests end as if each step had given one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from several_tokens import jumping

from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts.outputs import SamplerOutput
from hal.engine.llm import LLM
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.errors import ConfigError, InputError, StateError, WireError
from hal.recording.format import Recording
from hal.recording.record import RecordingExecutor
from hal.recording.replay import replay
from hal.sampling.params import SamplingParams

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2], [3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [0, 1, 2, 3]]
LONG = SamplingParams(max_tokens=60, ignore_eos=True)
# Ends by the end-of-sequence token, by the length, by a token of the request's own, and by a stop text.
PARAMS = [SamplingParams(max_tokens=60), LONG, SamplingParams(max_tokens=13, ignore_eos=True, logprobs=2), LONG,
          SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=(4,), logprobs=0),
          SamplingParams(max_tokens=60, ignore_eos=True, stop=("31", "9"), logprobs=1),
          SamplingParams(max_tokens=20, prompt_logprobs=1)]
SMALL = {"block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 12, "max_model_len": 80}
TIGHT = {**SMALL, "num_blocks": 24}


def generated(kind: str, **options: Any) -> tuple[list[Any], Any]:
    """What each request gave, and the engine's counts."""
    with LLM(device=f"several_tokens:{kind}", **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        return [(o.token_ids, o.text, o.finish_reason, o.logprobs, o.prompt_logprobs) for o in outputs], llm.stats()


@pytest.mark.slow
@pytest.mark.parametrize("options", [SMALL, TIGHT, {**SMALL, "tp": 2, "wire": "request"}, {**TIGHT, "pp": 2}], ids=[
    "alone", "few blocks", "tp=2", "pp=2, few blocks"])
def test_texts_are_those_of_one_token_a_step(options: dict[str, Any]) -> None:
    expected, plain = generated("one", **SMALL)
    assert [reason for _, _, reason, _, _ in expected] == ["stop", "length", "length", "length", "stop", "stop", "stop"]
    found, stats = generated("jumping", **options)
    assert found == expected
    total = sum(len(tokens) for tokens, *_ in found)
    assert plain.decode_tokens == total < stats.decode_tokens  # tokens behind an end were sampled, and are not shown
    assert stats.steps < plain.steps or "pp" in options
    assert (stats.preemptions > 0) == ("num_blocks" in options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [SMALL, {**TIGHT, "num_cpu_blocks": 20}, {**SMALL, "tp": 2}], ids=[
    "alone", "few blocks, swapping", "tp=2"])
def test_tokens_that_the_step_has_computed_are_not_computed_again(options: dict[str, Any]) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=n % 2 == 0) for n in (60, 50, 41, 60, 33, 60, 2)]
    with LLM(device="hal.testing.null:backend", **SMALL) as llm:
        expected = [(o.token_ids, o.text, o.finish_reason) for o in llm.generate(PROMPTS, params)]
        plain = llm.stats()
    with LLM(device="several_tokens:stepping", **options) as llm:
        assert [(o.token_ids, o.text, o.finish_reason) for o in llm.generate(PROMPTS, params)] == expected
        assert llm.stats().steps < plain.steps / 2 or "num_blocks" in options
        if "num_blocks" not in options:
            assert abs(llm.stats().prefill_tokens - plain.prefill_tokens) < 4  # by how chunks happen to fall


def test_a_stream_shows_no_token_behind_the_end() -> None:
    expected = generated("one", **SMALL)[0][5]
    with LLM(device="several_tokens:jumping", **SMALL) as llm:
        seen = [(list(o.token_ids), o.text) for o in llm.stream(PROMPTS[5], PARAMS[5])]
    assert seen[-1] == expected[:2] and all(expected[0][:len(tokens)] == tokens for tokens, _ in seen)
    assert all(expected[1].startswith(text) for _, text in seen)


def test_asynchronous_scheduling_with_several_tokens_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="async_scheduling prepares a step before"):
        LLM(device="several_tokens:jumping", async_scheduling=True)
    scheduler = Scheduler(EngineConfig(max_num_seqs=2), 40, ahead=True)
    scheduler.add(Sequence(request_id=0, prompt_ids=[1, 2], params=SamplingParams(), seed=0, limit=20))
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(StateError, match="does not fit"):
        scheduler.update(step, np.array([1, 2]), np.array([2]))


def test_a_failed_token_ends_the_sequence_behind_the_tokens_before_it() -> None:
    scheduler = Scheduler(EngineConfig(max_num_seqs=4, block_size=4), 40)
    seqs = [Sequence(request_id=i, prompt_ids=[1, 2 + i], params=SamplingParams(), seed=0, limit=20) for i in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    step = scheduler.schedule()
    assert step is not None and step.sampled == seqs
    tokens = np.array([5, -1, 6, -1, 5, 6, 7, 8, 9])
    assert scheduler.update(step, tokens, np.array([3, 1, 3])) == seqs[:2]
    assert [(s.output_ids, s.finish_reason) for s in seqs] == [([5], "error"), ([], "error"), ([7, 8, 9], None)]
    step = scheduler.schedule()
    assert step is not None and step.request.append_counts is not None
    assert step.request.append_tokens.tolist() == [7, 8, 9] and step.request.append_counts.tolist() == [3]
    assert step.request.num_scheduled.tolist() == [3] and step.request.new_blocks.tolist() != []


@pytest.mark.parametrize(("field", "values"), [
    ("counts", {"counts": [1, 3]}), ("token_ids", {"counts": [1, 1, 1]}), ("counts", {"counts": [0, 1]}),
    ("num_computed", {"counts": [2, 1], "num_computed": [1, 1]}), ("num_computed", {"num_computed": [0, 0]})])
def test_counts_that_contradict_the_places_are_refused(field: str, values: dict[str, list[int]]) -> None:
    tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}
    with pytest.raises(InputError, match=field):
        SamplerOutput(token_ids=torch.zeros(4, dtype=torch.int32), **tensors).check()
    good = SamplerOutput(token_ids=torch.arange(4, dtype=torch.int32), counts=torch.tensor([2, 1], dtype=torch.int32))
    good.check()
    assert good.rows() == [[0, 1], [2]]


def test_a_recording_of_several_tokens_replays(tmp_path: Path) -> None:
    path = tmp_path / "several.safetensors"
    with LLM(device="several_tokens:jumping", **SMALL) as llm:
        recorder = RecordingExecutor(llm.executor, WorkerConfig(llm.config, llm.model_config, Topology()), jumping)
        llm.executor = recorder
        outputs = llm.generate(PROMPTS, PARAMS)
        recorder.save(path)
    comparison = replay(path, jumping, "several_tokens:jumping")
    assert comparison.exact and sum(s.tokens for s in comparison.steps) > sum(len(o.token_ids) for o in outputs)
    recording = Recording.load(path)
    steps = [s for s in recording.steps if s.request.append_counts is not None]
    steps[0].request.append_counts[0] += 1  # type: ignore[index]
    recording.save(path)
    with pytest.raises(WireError, match=r"append_tokens is inconsistent|does not follow"):
        Recording.load(path)
