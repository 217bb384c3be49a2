"""Steps in two phases: masks and biases that arrive once the forward pass has begun give the tokens of those that were
there before, in every layout; and what an engine or a rank does wrong between the two phases is named."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts.backend import select
from hal.contracts.executor import Executor, make_executor
from hal.contracts.request import SamplingRequest
from hal.engine.scheduled_step import ScheduledStep
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.errors import InputError, SchemaError, StateError, WorkerError
from hal.features.declare import Feature
from hal.features.masks import TokenMasks, allowed, mask_fields
from hal.paged.batch import BatchState
from hal.recording.record import RecordingExecutor
from hal.recording.replay import replay
from hal.sampling.params import SamplingParams
from hal.schema import Doc

sys.path.insert(0, str(Path(__file__).parent))  # `import signalling`, here and in worker processes

import signalling

PROMPTS = [[7, 11, 14], [5, 14, 5, 15], [9], [8, 8, 12, 13, 14, 15, 5, 6, 7]]
VOCAB = read_config(EngineConfig().model).vocab_size
PARAMS = [SamplingParams(max_tokens=10, ignore_eos=True, seed=i, temperature=(0.0, 0.9)[i % 2],
                         logit_bias=((5 + i, 4.0),) if i > 1 else ()) for i in range(len(PROMPTS))]
BIAS = "bias_rows", "bias_counts", "bias_ids", "bias_values"


def rule(tokens: list[int]) -> np.ndarray:
    """What may follow: the tokens of one residue class, which the sum of all tokens before chooses."""
    return np.arange(VOCAB) % 3 == sum(tokens) % 3


def masks(step: ScheduledStep) -> dict[int, np.ndarray]:
    """Of all sequences but the last, which is free."""
    return {s.request_id: rule(s.token_ids) for s in step.sampled if s.request_id + 1 < len(PROMPTS)}


class Engine:
    """Drives an executor by a scheduler of its own. `folder` is where the ranks signal."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, late: bool = True, **options: Any) -> None:
        monkeypatch.setenv("TEST_SIGNALS", str(folder))
        self.folder, self.late, self.steps = folder, late, 0
        self.config = EngineConfig(**{"device": "signalling:null", "num_blocks": 40, "block_size": 4,
                                      "max_model_len": 64, "max_num_batched_tokens": 8, **options})
        self.model, self.backend = read_config(self.config.model), select(self.config.device)
        self.executor: Executor = make_executor(self.config, self.model, self.backend)
        ahead = bool(self.config.async_scheduling)
        self.scheduler = Scheduler(self.config, self.executor.num_blocks, depth=self.config.pp, ahead=ahead)
        self.most = max(self.config.pp, 1 + ahead)
        self.seqs = [Sequence(request_id=i, prompt_ids=list(prompt), params=PARAMS[i], seed=i, limit=len(prompt) + 10,
                              needs_tokens=ahead and not late) for i, prompt in enumerate(PROMPTS)]
        for seq in self.seqs:
            self.scheduler.add(seq)
        self.in_flight: list[Any] = []

    def submit(self) -> tuple[ScheduledStep, Any, dict[str, Any]] | None:
        """A step, its handle, and what its second message is to bring; None when no step can run."""
        step = self.scheduler.schedule()
        if step is None:
            return None
        self.steps += 1
        if not self.late:
            step.restrict(masks(step), VOCAB)
            return step, self.executor.execute_model(step.request), {}
        bias = {name: step.request[name] for name in BIAS if step.request[name] is not None}
        for name in bias:
            setattr(step.request, name, None)
        return step, self.executor.execute_model(step.request, sampling_follows=True), bias

    def take_over(self) -> None:
        step, handle = self.in_flight.pop(0)
        self.scheduler.update(step, handle.result().token_ids.numpy())

    def run(self, between: Callable[[Engine], None] = lambda engine: None) -> list[list[int]]:
        """The output of all sequences; `between` is called between the two phases of each step."""
        try:
            while self.scheduler.unfinished or self.in_flight:
                submitted = self.submit()
                if submitted is not None and self.late:
                    step, handle, bias = submitted
                    between(self)
                    while self.config.async_scheduling and self.in_flight:  # its last tokens become known only now
                        self.take_over()
                    rows = dict(zip((s.request_id for s in step.sampled), step.sampled_rows.tolist(), strict=True))
                    handle.sample(mask_fields({rows[i]: mask for i, mask in masks(step).items()}, VOCAB) | bias)
                if submitted is not None:
                    self.in_flight.append(submitted[:2])
                if submitted is None or len(self.in_flight) >= self.most:
                    self.take_over()
        finally:
            self.executor.shutdown()
        for seq in self.seqs[:-1]:
            for at in range(len(seq.prompt_ids), len(seq)):
                assert rule(seq.token_ids[:at])[seq.token_ids[at]], f"request {seq.request_id}, token {at}"
        return [seq.output_ids for seq in self.seqs]


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[list[int]]]:
    """The tokens where all masks and biases are there before the step, in one process."""
    def run(device: str) -> list[list[int]]:
        return Engine(tmp_path, monkeypatch, late=False, device=device, async_scheduling=False).run()

    return run


@pytest.mark.parametrize(("device", "options"), [
    ("cpu", {}), ("cpu", {"async_scheduling": True}), ("null", {"pp": 2}), *(
        pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("cpu", {"tp": 2}), ("cpu", {"pp": 2, "wire": "request"}),
            ("cpu", {"tp": 2, "wire": "request", "async_scheduling": True}),
            ("null", {"tp": 2, "pp": 2, "control_plane": "gloo"}), ("null", {"pp": 3, "wire": "request"})))], ids=str)
def test_columns_that_arrive_during_the_forward_pass_are_used(device: str, options: dict[str, Any], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    (tmp_path / "late").mkdir()
    world = options.get("tp", 1) * options.get("pp", 1)

    def all_began(engine: Engine) -> None:
        signalling.wait_for_forward(engine.folder, world, engine.steps)

    late = Engine(tmp_path / "late", monkeypatch, device=f"signalling:{device}", **options)
    tokens = late.run(all_began)
    assert tokens == expected(device)
    assert signalling.begun(late.folder, world - 1) == late.steps  # and none ran twice


@pytest.mark.slow
def test_ranks_that_torchrun_starts_are_each_given_both_messages(tmp_path: Path, expected: Any) -> None:
    import forked  # not where this file is a script

    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    done = forked.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"tokens{rank}").read_text()) for rank in range(2)] == [expected("null")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tp": 2}], ids=str)
def test_a_runner_in_one_part_waits_for_both_messages(options: dict[str, Any], tmp_path: Path, expected: Any,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def none_began(engine: Engine) -> None:
        assert signalling.begun(tmp_path, 0) == engine.steps - 1

    assert Engine(tmp_path, monkeypatch, device="signalling:one_part", **options).run(none_began) == expected("null")


@pytest.mark.slow
def test_an_engine_that_forgets_the_second_message_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tmp_path, monkeypatch, tp=2)
    step, handle, _ = engine.submit() or pytest.fail()
    with pytest.raises(StateError, match=r"(?s)step 1 cannot begin.*step 0 waits"):
        engine.submit()
    with pytest.raises(StateError, match="step 0 has no output"):
        handle.result()
    for columns, error in (({"mask_rows": np.zeros(1, np.int32)}, "mask_rows"), ({"new_rows": None}, "no such array"),
                           (mask_fields({9: np.ones(VOCAB, np.bool_)}, VOCAB), "mask_rows"),
                           (mask_fields({0: np.ones(99, np.bool_)}, 99), "words"),
                           ({"mask_rows": [0], "token_masks": [[1]]}, "mask_rows")):
        with pytest.raises(InputError, match=error):
            handle.sample(columns)
    step.restrict(masks(step), VOCAB, handle)  # after all that the step is still as it was
    assert len(handle.result().token_ids) == len(step.sampled)
    with pytest.raises(StateError, match="second call for step 0"):
        handle.sample()
    engine.executor.shutdown()


def test_arrays_of_a_feature_come_in_one_of_the_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tmp_path, monkeypatch)
    step = engine.scheduler.schedule()
    assert step is not None
    step.restrict(masks(step), VOCAB)
    handle = engine.executor.execute_model(step.request, sampling_follows=True)
    with pytest.raises(InputError, match="has its TokenMasks already"):
        step.restrict(masks(step), VOCAB, handle)
    handle.sample()
    assert len(handle.result().token_ids) == len(step.sampled)
    one = engine.executor.execute_model((engine.scheduler.schedule() or pytest.fail()).request)
    with pytest.raises(StateError, match="without sampling_follows"):
        one.sample()
    engine.executor.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"tp": 2}, pytest.param({"pp": 2, "wire": "request", "control_plane": "gloo"}, marks=pytest.mark.slow)], ids=str)
def test_an_engine_may_end_between_the_phases(options: dict[str, Any], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.executors.driver.PATIENCE", 30.0)  # a rank that waits for the second message hangs
    engine = Engine(tmp_path, monkeypatch, **options)
    _, handle, _ = engine.submit() or pytest.fail()
    processes = [p.process for p in engine.executor._ranks.processes]  # type: ignore[attr-defined]
    engine.executor.shutdown()
    assert all(process.returncode >= 0 for process in processes)  # none had to be killed
    for call in (handle.sample, handle.result, engine.executor.check):
        with pytest.raises(StateError, match="shut down"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tp": 2}, pytest.param({"pp": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_rank_that_dies_between_the_phases_is_named(options: dict[str, Any], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tmp_path, monkeypatch, **options)
    step, handle, _ = engine.submit() or pytest.fail()
    signalling.wait_for_forward(tmp_path, 2, 1)
    os.kill(engine.executor._ranks.processes[0].process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    killed = time.monotonic()
    with pytest.raises(WorkerError) as error:
        handle.sample()
        engine.scheduler.update(step, handle.result().token_ids.numpy())  # with tp=2 rank 0 samples by itself
        engine.submit()
    assert error.value.rank == 1 and error.value.cause == "died" and time.monotonic() - killed < 20
    with pytest.raises(WorkerError):
        engine.executor.check()


@pytest.mark.slow
def test_an_interrupt_of_the_second_phase_ends_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tmp_path, monkeypatch, tp=2)
    _, handle, _ = engine.submit() or pytest.fail()
    process = engine.executor._ranks.processes[0].process  # type: ignore[attr-defined]

    def interrupted(_: SamplingRequest) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.executor._worker, "sample", interrupted)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        handle.sample()
    assert process.poll() is not None
    with pytest.raises(StateError, match="shut down"):
        engine.submit()


def test_a_recording_holds_the_joined_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tmp_path, monkeypatch)
    engine.executor = recorder = RecordingExecutor(
        engine.executor, WorkerConfig(engine.config, engine.model, Topology()), engine.backend)
    tokens = engine.run()
    assert sum(step.request.token_masks is not None for step in recorder.recording.steps) > 5
    recorder.save(tmp_path / "run.safetensors")
    again = replay(tmp_path / "run.safetensors", select("null"), "null")
    assert again.exact and sum(s.tokens for s in again.steps) == sum(map(len, tokens))


def test_a_step_that_fails_as_it_samples_is_recorded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_RECORD_ON_ERROR", str(tmp_path))
    with pytest.raises(WorkerError, match="planted"):
        Engine(tmp_path, monkeypatch, device="signalling:fails").run()
    path, = tmp_path.glob("*rank-0*")
    monkeypatch.delenv("HAL_RECORD_ON_ERROR")
    again = replay(path, select("signalling:fails"), "signalling:fails")
    assert again.error is not None and "planted" in again.error and "planted" in (again.failure or "")


def test_what_sampling_needs_is_taken_for_the_step_prepared_last_alone() -> None:
    state = BatchState(4, 64, 4, VOCAB)
    with pytest.raises(StateError, match="not of the step that was prepared last"):
        state.prepare_sampling(SamplingRequest(step=0))
    scheduler = Scheduler(EngineConfig(num_blocks=40, block_size=4, max_model_len=64), 40)
    scheduler.add(Sequence(request_id=0, prompt_ids=[5, 6], params=SamplingParams(), seed=0, limit=9))
    request = (scheduler.schedule() or pytest.fail()).request
    state.apply(request)
    state.prepare(request)
    with pytest.raises(StateError, match="not of the step that was prepared last"):
        state.prepare_sampling(SamplingRequest(step=1))
    made = state.prepare_sampling(SamplingRequest(step=0, **mask_fields({0: rule([1])}, VOCAB))).to()
    assert (allowed(made.token_mask, VOCAB)[0].numpy() == rule([1])).all() and made.bias_ids is None


def test_only_arrays_of_the_request_may_arrive_late() -> None:
    with pytest.raises(SchemaError, match="Late cannot be for_sampling"):
        type("Late", (Feature,), {"for_sampling": True})
    with pytest.raises(SchemaError, match="Counted cannot be for_sampling"):
        type("Counted", (TokenMasks,), {"scalars": {"count": (0, Doc("of masks"))}})


if __name__ == "__main__":  # one of the ranks that torchrun starts
    found = Engine(Path(sys.argv[1]), pytest.MonkeyPatch(), tp=2, wire="none").run()
    (Path(sys.argv[1]) / f"tokens{os.environ['RANK']}").write_text(json.dumps(found))
