"""Recordings of steps with adapters: they name adapters, and whoever runs them says where these lie."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `planted`

import adapters_by_hand
import planted

from hal.cli import main
from hal.config import BUNDLED_MODEL, Topology, WorkerConfig
from hal.contracts import backend as backends
from hal.contracts.executor import make_executor
from hal.engine.llm import LLM
from hal.errors import ConfigError, WireError, WorkerError
from hal.recording.bisect import bisect
from hal.recording.format import Recording
from hal.recording.record import RecordingExecutor
from hal.recording.reduce import reduce
from hal.recording.replay import replay
from hal.sampling.params import SamplingParams

SMALL = {"dtype": "float32", "num_blocks": 65, "block_size": 4, "max_model_len": 64, "max_num_seqs": 4,
         "max_adapters": 2, "max_adapter_rank": 4}
PROMPTS = ["37+85=", "123+456=", "37+85=", "999+1="]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    return {name: str(adapters_by_hand.write(tmp_path / name, BUNDLED_MODEL, i, strength=0.8))
            for i, name in enumerate("ab")}


def params(tokens: int = 6) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=tokens, ignore_eos=True, adapter=name, logprobs=2)
            for name in ("a", None, "b", "a")]


@pytest.fixture
def recorded(given: dict[str, str], tmp_path: Path) -> Path:
    """Adapters are loaded before the first step, and while requests run."""
    with LLM(device="cpu", async_scheduling=False, **SMALL) as llm:  # type: ignore[arg-type]
        config = WorkerConfig(llm.config, llm.model_config, Topology())
        recorder = llm.executor = RecordingExecutor(llm.executor, config, llm.backend)
        llm.load_adapter("a", given["a"])
        for prompt, each in zip(PROMPTS[:2], params(), strict=False):
            llm.add_request(prompt, each)
        for _ in range(3):
            llm.step()
        llm.load_adapter("b", given["b"])
        for prompt, each in zip(PROMPTS[2:], params()[2:], strict=True):
            llm.add_request(prompt, each)
        while llm.unfinished:
            llm.step()
        recorder.save(tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


def test_replay_and_bisect(recorded: Path, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                           ) -> None:
    assert str(tmp_path / "a").encode() not in recorded.read_bytes()
    cpu = backends.load("cpu")
    with pytest.raises(ConfigError, match=r"(?s)a file does not choose what is read.*--adapter b=DIR"):
        replay(recorded, cpu, "cpu", adapters={"a": given["a"]})
    assert replay(recorded, cpu, "cpu", adapters=given).exact
    swapped = {"a": given["b"], "b": given["a"]}
    assert replay(recorded, cpu, "cpu", adapters=swapped).wrong(0.01)
    monkeypatch.setenv("PLANT", "adapt 6")
    found = bisect(recorded, "planted:planted", "cpu", adapters=given).divergence
    assert found is not None and str(found.call) == "layer 1, adapt (layers.1.mlp.gate_up)" and not found.between
    smaller = reduce(Recording.load(recorded), "planted:planted", "cpu", adapters=given)
    assert smaller.found is not None and smaller.found.divergence is not None
    rows = {row for step in smaller.recording.steps for row in step.request.rows.tolist()}
    assert len(rows) == 1 and len(smaller.recording.steps) <= 2


def test_steps_that_no_engine_could_run_are_refused(recorded: Path, tmp_path: Path) -> None:
    for name, value in (("adapted_slots", 2), ("adapters_to_load", -1), ("adapted_rows", 3)):
        recording = Recording.load(recorded)
        recording.steps[0].request[name][:] = value
        recording.save(tmp_path / "changed")
        with pytest.raises(WireError, match=rf"(?s)cannot be run.*{name}"):
            Recording.load(tmp_path / "changed")


def test_a_step_that_fails_can_be_run_again(given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            ) -> None:
    monkeypatch.setenv("HAL_RECORD_ON_ERROR", str(tmp_path / "failed"))
    monkeypatch.setenv("FAIL_AT", "9")
    with pytest.raises(WorkerError) as error, LLM(device="planted:failing", **SMALL) as llm:  # type: ignore[arg-type]
        for name, path in given.items():
            llm.load_adapter(name, path)
        llm.generate(PROMPTS, params(24))
    path = next((tmp_path / "failed").glob("*rank-0*"))
    assert f"--adapter a={given['a']} --adapter b={given['b']}" in str(error.value)
    monkeypatch.delenv("HAL_RECORD_ON_ERROR")
    recording = Recording.load(path)
    config = recording.config(backends.load("cpu"), device="cpu", adapters=given)
    executor = make_executor(config.engine, config.model, backends.load("cpu"))
    outputs = [executor.execute_model(step.request).result().token_ids.tolist() for step in recording.steps]
    executor.shutdown()
    assert outputs[-1] == planted.FailingRunner.tokens and outputs[-1]


def test_command_line(given: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--adapter makes room by itself; a line names its adapter, or has that of --use-adapter."""
    with LLM(device="cpu", **SMALL) as llm:  # type: ignore[arg-type]
        for name, path in given.items():
            llm.load_adapter(name, path)
        one, none, other = (llm.generate(PROMPTS[0], SamplingParams(max_tokens=6, adapter=name))[0].text
                            for name in ("a", None, "b"))
    (tmp_path / "lines.jsonl").write_text('{"prompt": "37+85=", "adapter": "b"}\n{"prompt": "37+85="}\n'
                                          '{"prompt": "37+85=", "adapter": null}\n{"prompt": "1", "adapter": "c"}\n')
    flags = [f"--adapter={name}={path}" for name, path in given.items()]
    status = main(["generate", "--device=cpu", "--num-blocks=64", "--dtype=float32", "--max-tokens=6", *flags,
                   "--use-adapter=a", "--input", str(tmp_path / "lines.jsonl")])
    out, err = capsys.readouterr()
    assert status == 1
    assert [line for line in out.splitlines() if line and not line.startswith(">")] == [other, one, none]
    assert "line 4: no adapter of this name is loaded" in err and len({one, none, other}) == 3
    run = str(tmp_path / "run")
    assert main(["record", "--output", run, "--device=cpu", "--num-blocks=64", *flags, "--use-adapter=b", "1+1="]) == 0
    assert main(["replay", run, "--device=cpu", *flags]) == 0
    assert main(["replay", run, "--device=cpu"]) == 1
    assert "--adapter a=DIR" in capsys.readouterr().err
