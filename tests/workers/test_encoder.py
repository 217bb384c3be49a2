"""A runner without a KV cache, with an input and an output of its own, under the one worker: in every topology, under
every wire policy, on every control plane, and in a recording."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encoder_case import MODEL, TEXTS, Embeddings, EncoderInput, embed, encoder, plain, start
from launch_case import launch

from hal.config import Topology, WorkerConfig
from hal.engine.llm import LLM
from hal.errors import BackendError, ConfigError, StateError, WireError, WorkerError
from hal.recording.bisect import bisect
from hal.recording.format import Recording
from hal.recording.record import RecordingExecutor
from hal.recording.replay import replay
from hal.testing.null import NullBackend


@pytest.mark.parametrize("options", [
    {}, {"tp": 2, "wire": "model-input"},
    pytest.param({"tp": 2, "wire": "request", "control_plane": "gloo"}, marks=pytest.mark.slow),
    pytest.param({"pp": 2, "wire": "request", "control_plane": "shm"}, marks=pytest.mark.slow)], ids=str)
def test_embeddings_are_those_of_a_plain_forward_pass(options: dict[str, object]) -> None:
    executor = start(**options)
    try:
        assert executor.num_blocks == 0
        assert (executor.input_type, executor.output_type) == (EncoderInput, Embeddings)
        torch.testing.assert_close(embed(executor), plain(TEXTS))
    finally:
        executor.shutdown()


@pytest.mark.slow
def test_every_rank_that_torchrun_starts_has_the_embeddings(tmp_path: Path) -> None:
    done = launch(2, Path(__file__).with_name("encoder_case.py"), json.dumps({"tp": 2, "wire": "none"}), str(tmp_path))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        torch.testing.assert_close(torch.tensor(json.loads((tmp_path / str(rank)).read_text())), plain(TEXTS))


def test_a_recording_replays(tmp_path: Path) -> None:
    executor, path = start(), tmp_path / "encoder.safetensors"
    config = WorkerConfig(executor._worker.config.engine, MODEL, Topology())  # type: ignore[attr-defined]
    recorder = RecordingExecutor(executor, config, encoder)
    found = embed(recorder)
    recorder.shutdown()
    recorder.save(path)
    comparison = replay(path, encoder, "encoder_case:encoder")
    assert comparison.exact and len(comparison.steps) == 2
    recording = Recording.load(path)
    assert recording.output_name == "Embeddings" and not recording.paged
    recording.restore_outputs(Embeddings)
    assert torch.cat([step.output.embeddings for step in recording.steps]).equal(found)  # type: ignore[union-attr]
    recording.steps[1].output.embeddings[0, 0] += 0.5  # type: ignore[union-attr]
    recording.save(path)
    comparison = replay(path, encoder, "encoder_case:encoder")
    assert [s.exact for s in comparison.steps] == [True, False] and comparison.wrong(1e-3) == [comparison.steps[1]]
    with pytest.raises(WireError, match="another kind of runner"):
        replay(path, NullBackend(), "null")
    with pytest.raises(BackendError, match="can be bisected"):
        bisect(path, "cpu", "cpu")


@pytest.mark.parametrize(("name", "field"), [("a_dict", "output_type cannot be carried"),
                                             ("local_field", "fields that do not travel")])
def test_an_output_that_cannot_be_carried_is_refused_at_construction(name: str, field: str) -> None:
    with pytest.raises(BackendError, match=field):
        start(name)


@pytest.mark.slow
def test_ranks_that_differ_in_their_output_type_do_not_start() -> None:
    with pytest.raises((StateError, WorkerError), match=r"rank 1 differs from the driver in schema (Wider)?Embeddings"):
        start("differs", tp=2)


def test_an_engine_that_generates_refuses_a_runner_that_yields_no_tokens() -> None:
    with pytest.raises(ConfigError, match="yields Embeddings"):
        LLM(device="encoder_case:encoder")
