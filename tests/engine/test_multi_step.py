"""Several decode steps for one message: the same outputs as with one, from fewer messages."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pytest
import torch

from hal.config import EngineConfig
from hal.contracts.inputs import PagedModelInput
from hal.engine.llm import LLM
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.errors import ConfigError, SchemaError, StateError
from hal.sampling.params import SamplingParams
from hal.schema import Array
from hal.testing.null import NullBackend, NullRunner

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2], [3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [0, 1, 2, 3]]
# Ends by the end-of-sequence token, by the length, by a token of the request's own, and by a stop text.
PARAMS = [SamplingParams(max_tokens=60), SamplingParams(max_tokens=60, ignore_eos=True),
          SamplingParams(max_tokens=13, ignore_eos=True, logprobs=2),
          SamplingParams(max_tokens=50, temperature=0.8, seed=5, top_p=0.9, min_p=0.01),
          SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=(4,), logprobs=0),
          SamplingParams(max_tokens=60, ignore_eos=True, stop=("31", "9"), logprobs=1),
          SamplingParams(max_tokens=20, prompt_logprobs=1, repetition_penalty=1.3, frequency_penalty=0.2,
                         logit_bias={3: 1.0}, ignore_eos=True)]
SMALL = {"block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 12, "max_model_len": 80}
TIGHT = {**SMALL, "num_blocks": 24}


def generated(device: str, **options: Any) -> tuple[list[Any], Any]:
    with LLM(device=device, **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        return [(o.token_ids, o.text, o.finish_reason, o.logprobs, o.prompt_logprobs) for o in outputs], llm.stats()


@pytest.fixture(scope="module")
def plain() -> tuple[list[Any], Any]:
    return generated("null", **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {**SMALL, "steps_per_message": 2}, {**SMALL, "steps_per_message": 8}, {**SMALL, "steps_per_message": "auto"},
    {**SMALL, "steps_per_message": 8, "async_scheduling": True},
    {**TIGHT, "steps_per_message": 5, "async_scheduling": False},
    {**TIGHT, "steps_per_message": 8, "num_cpu_blocks": 20},
    {**TIGHT, "steps_per_message": 8, "async_scheduling": True}], ids=[
    "2", "8", "auto", "asynchronous", "few blocks", "swapping", "asynchronous, few blocks"])
def test_outputs_are_those_of_one_step_a_message(options: dict[str, Any], plain: tuple[list[Any], Any]) -> None:
    expected, before = plain
    found, stats = generated("null", **options)
    assert found == expected
    assert stats.steps < before.steps / 1.5 and (stats.preemptions > 0) == ("num_blocks" in options)
    if not options.get("async_scheduling"):  # a step that was submitted before an end was known samples in vain
        assert stats.decode_tokens == before.decode_tokens  # later tokens of a row that has ended are not counted


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"wire": "model-input"}, {"wire": "request", "control_plane": "gloo"},
                                     {"wire": "request", "async_scheduling": True, "num_blocks": 24}], ids=str)
def test_tensor_parallel_ranks_take_the_steps_alike(options: dict[str, Any], plain: tuple[list[Any], Any]) -> None:
    assert generated("null", **{**SMALL, "tp": 2, "steps_per_message": 8, **options})[0] == plain[0]


@pytest.mark.slow
def test_the_model_of_the_cpu_gives_the_same_tokens() -> None:
    expected = generated("cpu", **SMALL)[0]
    found = generated("cpu", **SMALL, steps_per_message=8)[0]
    assert [one[:3] for one in found] == [one[:3] for one in expected]
    for (*_, got, _), (*_, want, _) in zip(found, expected, strict=True):
        assert (got is None) == (want is None) and len(got or ()) == len(want or ())
        for a, b in zip(got or (), want or (), strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank) and abs(a.logprob - b.logprob) < 1e-3


def test_a_stream_grows_by_several_tokens_and_an_abort_ends_it() -> None:
    with LLM(device="null", steps_per_message=8, **SMALL) as llm:
        seen = [len(o.token_ids) for o in llm.stream([1, 2], SamplingParams(max_tokens=20, ignore_eos=True))]
        assert seen == [1, 9, 17, 20]
        number = llm.add_request([3, 4], SamplingParams(max_tokens=60, ignore_eos=True))
        llm.step()
        llm.step()
        llm.abort(number)
        assert not llm.unfinished and llm.generate([[1, 2]])[0].finish_reason is not None


def scheduler(steps: Any = 8, blocks: int = 40, **options: Any) -> Scheduler:
    return Scheduler(EngineConfig(max_num_seqs=4, block_size=4), blocks, eos_token_ids=[9], steps=steps, **options)


def sequence(number: int, limit: int = 30, **options: Any) -> Sequence:
    params = options.pop("params", SamplingParams())
    return Sequence(request_id=number, prompt_ids=[1, 2], params=params, seed=0, limit=limit, **options)


def begun(s: Scheduler, *seqs: Sequence) -> None:
    """The sequences have got their first token."""
    for seq in seqs:
        s.add(seq)
    step = s.schedule()
    assert step is not None and step.request.num_steps == 1
    s.update(step, np.full(len(seqs), 5))


def test_slots_are_given_ahead_and_the_steps_end_with_the_longest() -> None:
    s = scheduler()
    begun(s, sequence(0), sequence(1, limit=6))
    step = s.schedule()
    assert step is not None and step.gains is not None
    assert step.request.num_steps == 8 and step.request.max_new.tolist() == step.gains.tolist() == [8, 3]
    assert step.request.stop_ids[:, 0].tolist() == [9, 9] and (step.request.stop_ids[:, 1:] == -1).all()
    assert len(s.running[0].blocks) == 3 and len(s.running[1].blocks) == 2  # 3 + 7 and 3 + 2 tokens
    tokens = np.array([[5] * 8, [5, 5, 5, 0, 0, 0, 0, 0]])
    seqs = list(s.running)
    assert s.update(step, tokens.reshape(-1), np.array([8, 3])) == [seqs[1]]
    assert len(seqs[0].output_ids) == 9 and seqs[1].finish_reason == "length"
    step = s.schedule()
    assert step is not None and step.request.append_counts.tolist() == [8]  # type: ignore[union-attr]


def test_few_blocks_mean_fewer_steps_and_nobody_is_preempted() -> None:
    s = scheduler(blocks=4)  # three to give
    begun(s, sequence(0, limit=10), sequence(1, limit=10))
    step = s.schedule()
    assert step is not None and step.request.num_steps == 2 and not any(q.preemptions for q in s.running)


@pytest.mark.parametrize("seq", [sequence(1, needs_tokens=True),
                                 sequence(1, params=SamplingParams(stop_token_ids=tuple(range(20, 29))))],
                         ids=["masks", "more stop tokens than a step carries"])
def test_a_sequence_that_needs_the_host_keeps_to_one_step(seq: Sequence) -> None:
    s = scheduler()
    begun(s, sequence(0), seq)
    step = s.schedule()
    assert step is not None and step.gains is None and step.request.num_steps == 1


def test_auto_takes_one_step_while_a_request_waits() -> None:
    s = scheduler("auto", blocks=4)
    begun(s, sequence(0, limit=10))
    for number in (1, 2, 3):
        s.add(sequence(number, limit=10))
    kinds = set()
    while (step := s.schedule()) is not None:
        kinds.add((step.request.num_steps > 1, bool(s.waiting)))
        gains = np.ones(len(step.sampled), np.int64) if step.gains is None else step.gains
        tokens = np.full(len(gains) * step.request.num_steps, 5)
        s.update(step, tokens, None if step.gains is None else gains)
    assert (True, False) in kinds and (False, True) in kinds and (True, True) not in kinds


def test_masks_and_outputs_that_do_not_fit_several_steps_are_refused() -> None:
    s = scheduler()
    begun(s, sequence(0))
    step = s.schedule()
    assert step is not None
    with pytest.raises(StateError, match="mask is given for a step that gives"):
        step.restrict({0: np.ones(20, np.bool_)}, 20)
    with pytest.raises(StateError, match="does not fit"):
        s.update(step, np.array([5]))
    with pytest.raises(StateError, match="stopped a sequence that has not ended"):
        s.update(step, np.full(8, 5), np.array([3]))


def test_a_token_behind_the_end_is_never_shown_even_where_the_device_went_on() -> None:
    s = scheduler()
    begun(s, sequence(0), sequence(1), sequence(2))
    seqs = list(s.running)
    step = s.schedule()
    assert step is not None
    tokens = np.full((3, 8), 5)
    tokens[0, 3], tokens[1, 2] = 9, -1
    assert s.update(step, tokens.reshape(-1), np.full(3, 8)) == [seqs[1], seqs[0]]
    assert [(q.output_ids, q.finish_reason) for q in seqs] == [
        ([5, 5, 5, 5, 9], "stop"), ([5, 5, 5], "error"), ([5] * 9, None)]


class OwnInput(PagedModelInput):
    flavour: Annotated[torch.Tensor | None, Array("int32", "num_seqs")] = None


class OwnInputRunner(NullRunner):
    input_type = OwnInput


class OwnStep(NullRunner):
    def execute_model(self, *args: Any) -> Any:
        return super().execute_model(*args)


class Of(NullBackend):
    def __init__(self, kind: type[NullRunner]) -> None:
        self.kind = kind

    def make_runner(self, *args: Any) -> Any:
        return self.kind(*args)


own_input, own_step = Of(OwnInputRunner), Of(OwnStep)


@pytest.mark.parametrize("device, error, match", [
    ("test_multi_step:own_input", SchemaError, "OwnInput cannot be advanced"),
    ("test_multi_step:own_step", ConfigError, "OwnStep does not take several decode steps")])
def test_what_cannot_take_several_steps_is_refused_by_name(device: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LLM(device=device, steps_per_message=2, **SMALL)
    with LLM(device=device, steps_per_message="auto" if "step:own_step" in device else 1, **SMALL) as llm:
        assert llm.scheduler.steps == 1


def test_pipeline_stages_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="steps_per_message keeps the sampled tokens within one pipeline stage"):
        EngineConfig(steps_per_message=2, pp=2)
    for bad in (0, 65, "two", None, 1.5):
        with pytest.raises(ConfigError, match="steps_per_message"):
            EngineConfig(steps_per_message=bad)  # type: ignore[arg-type]
    assert EngineConfig(steps_per_message="auto", pp=2).steps_per_message == "auto"


def test_auto_takes_one_step_where_an_array_has_no_rule() -> None:
    assert generated("test_multi_step:own_input", **SMALL, steps_per_message="auto")[1].steps == generated(
        "test_multi_step:own_input", **SMALL)[1].steps
