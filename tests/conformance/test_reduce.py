"""Recordings that are given to others: smaller ones that show the same fault, and ones without the tokens."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `planted`, also for commands

from hal.cli import main
from hal.contracts import backend as backends
from hal.contracts.executor import make_executor
from hal.engine.llm import LLM
from hal.errors import WireError, WorkerError
from hal.paged.runner import PagedModelRunner
from hal.recording.bisect import bisect_recording
from hal.recording.format import Recording
from hal.recording.record import record_run
from hal.recording.reduce import only, reduce
from hal.recording.replay import replay
from hal.recording.share import refill, shareable
from hal.sampling.params import SamplingParams

# What is spoilt in which steps, and what bisect names. The condition of the last two holds late, or in larger steps.
SEQUENCES, STEPS = 6, 9
FAULTS = [("linear 5", "tokens 0"), ("rms_norm 0", "tokens 0"), ("rotary 1", "position 11"),
          ("silu_mul 2", "tokens 11")]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of the bundled model's sequences, some of which share a prefix, are drawn or are penalised."""
    path = tmp_path_factory.mktemp("reduce") / "run.safetensors"
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 12, 5 + i % 7).tolist() for i in range(SEQUENCES - 1)]
    prompts.append([*prompts[0], 1, 2, 3])
    params = [SamplingParams(max_tokens=STEPS, ignore_eos=True, temperature=0.8 * (i % 2), seed=i, logprobs=2,
                             repetition_penalty=1.1 if i % 3 == 0 else 1.0, logit_bias={3: 1.0} if i == 4 else {})
              for i in range(SEQUENCES)]
    with LLM(device="cpu", dtype="float32", max_num_seqs=16, num_blocks=120, max_model_len=64, block_size=8,
             max_num_batched_tokens=64, async_scheduling=False) as llm:
        record_run(llm, prompts, params, path)
    assert len(Recording.load(path).steps) >= STEPS
    return path


def test_nothing_but_the_ids_of_tokens_is_left_out(recorded: Path, tmp_path: Path) -> None:
    original = Recording.load(recorded)
    shared = shareable(original)
    assert len(shared.steps) == len(original.steps)
    new, old = (np.concatenate([s.request.new_tokens for s in r.steps]) for r in (shared, original))
    assert (new != old).any() and len(np.unique(new)) == len(np.unique(old))
    assert ((new[:, None] == new[None]) == (old[:, None] == old[None])).all()
    for a, b in zip(shared.steps, original.steps, strict=True):
        assert a.output is None and a.input is not None and b.input is not None
        for name in ("positions", "slot_mapping", "seq_lens", "block_tables", "temperature", "seed"):
            assert (a.input[name] is b.input[name] is None) or torch.equal(a.input[name], b.input[name])
    backend = backends.load("cpu")
    config = shared.config(backend, device="cpu")
    refill(shared, lambda: make_executor(config.engine, config.model, backend))
    shared.save(tmp_path / "shared.safetensors")
    assert replay(tmp_path / "shared.safetensors", backend, "cpu").exact


def test_a_shared_recording_of_words_holds_none_of_their_tokens(tmp_path: Path) -> None:
    """Of a run whose tokens are a small part of the vocabulary, nearly all are gone. (Where nearly the whole vocabulary
    is used, as with the bundled model's digits, other tokens have the same ids.)"""
    original = Recording.load(sorted((Path(__file__).parents[2] / "hal/assets/golden").glob("*.safetensors"))[0])
    wide = dataclasses.replace(original, model=dataclasses.replace(original.model, vocab_size=50_000))
    tokens = {int(t) for s in wide.steps for t in s.request.new_tokens}
    shared = {int(t) for s in shareable(wide).steps for t in s.request.new_tokens}
    assert len(shared) == len(tokens) and len(shared & tokens) <= 2


@pytest.mark.parametrize(("what", "when"), [
    fault if i == 2 else pytest.param(*fault, marks=pytest.mark.slow) for i, fault in enumerate(FAULTS)])
def test_a_fault_is_reduced_to_its_sequences_and_steps(monkeypatch: pytest.MonkeyPatch, recorded: Path, what: str,
                                                       when: str) -> None:
    monkeypatch.setenv("PLANT", what)
    monkeypatch.setenv("PLANT_WHEN", when)
    reduction = reduce(Recording.load(recorded), "planted:planted", "cpu")
    rows = {row for step in reduction.recording.steps for row in step.request.rows.tolist()}
    assert len(reduction.recording.steps) <= 3 and len(rows) <= 2, str(reduction)
    assert reduction.found is not None and reduction.found.divergence is not None
    assert reduction.found.divergence.call.op == what.split()[0]


def test_a_shared_recording_shows_the_same_faults(monkeypatch: pytest.MonkeyPatch, recorded: Path) -> None:
    shared = shareable(Recording.load(recorded))
    for what, when in FAULTS[::2]:
        monkeypatch.setenv("PLANT", what)
        monkeypatch.setenv("PLANT_WHEN", when)
        found = bisect_recording(shared, "planted:planted", "cpu", until_divergence=True).divergence
        assert found is not None and found.call.op == what.split()[0]


def test_a_step_that_fails_is_reduced_to_a_sequence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HAL_RECORD_ON_ERROR", str(tmp_path))
    monkeypatch.setenv("FAIL_AT", "6")
    with pytest.raises(WorkerError), LLM(device="planted:failing", max_num_seqs=4, num_blocks=60) as llm:
        llm.generate(["37+85=", "1+1=", "123+456="], SamplingParams(max_tokens=9, ignore_eos=True))
    monkeypatch.delenv("HAL_RECORD_ON_ERROR")
    monkeypatch.setenv("FAIL_AT", "-1")  # each step's number says so no more; here the last one fails always
    monkeypatch.setattr("planted.FailingRunner.execute_model", _fails_on_decoding)
    path, out = next(tmp_path.glob("*.safetensors")), tmp_path / "small.safetensors"
    assert main(["reduce", str(path), "--device", "planted:failing", "--output", str(out)]) == 0
    assert "1 sequences" in capsys.readouterr().out
    assert len({row for s in Recording.load(out).steps for row in s.request.rows.tolist()}) == 1


def _fails_on_decoding(self: Any, m: Any, *args: Any) -> Any:
    if m.max_query_len == 1 and int(m.seq_lens.max()) > 6:
        raise ArithmeticError("the device gave up")
    return PagedModelRunner.execute_model(self, m, *args)


def test_a_recording_without_a_fault_is_refused(recorded: Path) -> None:
    with pytest.raises(WireError, match="shows no fault"):
        reduce(only(Recording.load(recorded), [0, 1]), "cpu", "cpu")  # type: ignore[arg-type]


def test_the_command_shares_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["record", "--device", "cpu", "--num-blocks", "40", "--max-tokens", "4", "--shareable",
                 "--output", str(out), "37+85="]) == 0
    said = capsys.readouterr().out
    assert "not kept: token ids" in said and "122" not in said
    assert main(["replay", str(out), "--device", "cpu"]) == 0 and "last bit" in capsys.readouterr().out
    assert main(["record", "--from", str(out), "--device", "cpu", "--output", str(tmp_path / "again")]) == 0
    assert main(["record", "--output", str(out)]) == 2


def test_the_tokens_are_never_in_the_file_that_is_to_be_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(recording: Recording) -> Recording:
        raise WireError("planned")

    monkeypatch.setattr("hal.recording.share.shareable", fails)
    out = tmp_path / "out.safetensors"
    assert main(["record", "--device", "cpu", "--num-blocks", "40", "--max-tokens", "2", "--shareable",
                 "--output", str(out), "37+85="]) != 0
    assert not out.exists()
