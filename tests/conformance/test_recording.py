"""Record, replay, bisect; and a step that fails, run again."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))  # `planted`

import families
import planted

from hal.cli import main
from hal.config import BUNDLED_MODEL
from hal.conformance.cases.guard import GOLDEN
from hal.contracts import backend as backends
from hal.contracts.executor import make_executor
from hal.contracts.request import ExecuteModelRequest
from hal.engine.llm import LLM
from hal.errors import BackendError, CapacityError, ConfigError, WireError, WorkerError
from hal.features import COLUMNS
from hal.models.ops import Ops
from hal.recording.bisect import _TRACED, _Device, _Traced, bisect
from hal.recording.format import Recording
from hal.recording.record import record_run
from hal.recording.replay import replay
from hal.sampling.params import SamplingParams

SMALL = {"dtype": "float32", "num_blocks": 65, "block_size": 4, "max_model_len": 128, "max_num_seqs": 4}
GREEDY = GOLDEN / "cpu-float32-greedy.safetensors"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_golden_recordings_replay_on_the_cpu(path: Path) -> None:
    comparison = replay(path, backends.load("cpu"), "cpu", dtype="float32")
    assert not comparison.wrong(2e-4), comparison.table()
    assert sum(s.tokens for s in comparison.steps) >= 8


def test_a_recording_holds_the_requests_inputs_and_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.safetensors"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["record", "--output", str(path), "--device", "cpu", *options, "37+85=", "37+5="]) == 0
    assert capsys.readouterr().out == "122\n42\n"
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["hal"])
        assert file.get_tensor("00000.input.input_ids").dtype == torch.int32
    assert head["info"]["device"] == "cpu" and head["info"]["versions"]["torch"] == torch.__version__
    assert head["schemas"].keys() == {"ExecuteModelRequest", "PagedModelInput", "SamplerOutput"}
    assert main(["replay", str(path), "--device", "cpu"]) == 0
    assert "equal to the last bit" in capsys.readouterr().out
    assert main(["bisect", str(path), "--device", "cpu", "--against", "cpu"]) == 0
    assert "no token is another" in capsys.readouterr().out


def test_differences_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PLANT", "add_rms_norm 7")
    assert main(["replay", str(GREEDY), "--device", "planted:planted"]) == 1
    assert re.search(r"largest logprob error 0\.000[23]", capsys.readouterr().out)


def test_a_recording_of_an_fp8_cache_runs_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recording, path = Recording.load(GREEDY), tmp_path / "fp8"
    recording.engine = dataclasses.replace(recording.engine, kv_dtype="fp8")
    recording.save(path)
    cpu = backends.load("cpu")
    monkeypatch.setattr(cpu, "capabilities", dataclasses.replace(cpu.capabilities, fp8_kv=False), raising=False)
    assert Recording.load(path).engine.kv_dtype == "fp8" and not cpu.capabilities.fp8_kv
    assert not replay(path, cpu, "cpu").wrong(2e-4)
    assert bisect(path, "cpu", "cpu").divergence is None
    assert "fp8 KV cache" in replay(path, cpu, "cpu").recorded
    with pytest.raises(BackendError, match="no fp8 KV cache"):
        replay(path, cpu, "cpu", kv_dtype="fp8")
    # One of the two has it: then neither uses it, since what it rounds is nobody's fault.
    kinds, able = [], dataclasses.replace(cpu.capabilities, fp8_kv=True)
    made, config = type(cpu)(), Recording.config
    monkeypatch.setattr(made, "capabilities", able, raising=False)
    assert not cpu.capabilities.fp8_kv
    monkeypatch.setattr(backends, "select", lambda name: made if name == "able" else cpu)
    monkeypatch.setattr(Recording, "config", lambda *args, **options: (c := config(*args, **options), kinds.append(
        c.engine.kv_dtype))[0])
    assert bisect(path, "able", "cpu").divergence is None and kinds == ["auto"] * 3


def test_a_file_that_is_not_a_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Recording.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recording.load(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(WireError, match="not a recording"):
        Recording.load(tmp_path / "foreign")


Head, Tensors = dict[str, Any], dict[str, torch.Tensor]


def forged(path: Path, change: Callable[[Head, Tensors], object], source: Path = GREEDY) -> Path:
    """A copy of a recording after `change`, each step's digest made to fit those before it."""
    with safe_open(source, framework="pt") as file:
        head = json.loads(file.metadata()["hal"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(head, tensors)
    digest = 0
    for i, step in enumerate(head["steps"]):
        start = f"{i:05}.request."
        step["request"]["digest"] = digest
        arrays: Any = {name[len(start):]: t.numpy() for name, t in tensors.items() if name.startswith(start)}
        digest = ExecuteModelRequest(**arrays, **step["request"]).chain()
    save_file(tensors, path, {"hal": json.dumps(head)})
    return path


def put(name: str, value: float, column: str = "") -> Callable[[Head, Tensors], object]:
    """Replace the first number of an array, or that of a sampling parameter's column."""
    at = next((i for columns in COLUMNS.values() for i, c in enumerate(columns) if c.name == column), 0)
    return lambda head, tensors: tensors[name].view(-1).__setitem__(at, value)


FORGED = [("00000.request.new_rows", -1, "new_rows"), ("00000.request.new_rows", 8, "new_rows"),
          ("00000.request.rows", 7, "hold a sequence"), ("00000.request.new_lens", 5000, "new_lens"),
          ("00000.request.new_prompt_lens", 127, "new_prompt_lens"), ("00000.request.new_tokens", 16, "new_tokens"),
          ("00000.request.new_floats", float("nan"), "temperature"), ("00000.request.new_ints", -1, "top_k"),
          ("00000.request.block_counts", 2**31 - 1, "block_counts"), ("00000.request.block_rows", 5, "block_rows"),
          ("00000.request.new_blocks", 0, "new_blocks"), ("00000.request.new_blocks", 10**6, "new_blocks"),
          ("00000.request.num_scheduled", 128, "num_scheduled"), ("00000.request.num_computed", 2**31 - 1, "num_sched"),
          ("00002.request.append_rows", 7, "append_rows"), ("00002.request.append_tokens", -1, "append_tokens"),
          ("00000.input.positions", 1, "not what its request means"), ("00000.output.token_ids", 16, "other tokens")]


@pytest.mark.parametrize(("name", "value", "words"), FORGED)
def test_steps_that_no_engine_could_run_are_refused(name: str, value: float, words: str, tmp_path: Path) -> None:
    """Before anything is executed, digests and all else being right."""
    with pytest.raises(WireError, match=words):
        Recording.load(forged(tmp_path / "bad", put(name, value, words)))


@pytest.mark.slow
@pytest.mark.parametrize(("part", "name", "value"), [
    ("engine", "max_num_seqs", 10**9), ("engine", "max_num_batched_tokens", 10**12), ("engine", "block_size", 2**40),
    ("engine", "max_model_len", 2**40), ("engine", "max_model_len", 513), ("engine", "num_cpu_blocks", 10**9),
    ("engine", "memory_fraction", "x"), ("engine", "heartbeat", None), ("engine", "graphs", 1), ("engine", "new", 1),
    ("engine", "dtype", "nope"), ("model", "num_layers", 10**7), ("model", "windows", None), ("model", "rope", [1]),
    ("model", "vocab_size", True), ("model", "eos_token_ids", ["2"]), ("model", "norm_eps", float("nan")),
    ("info", "device", None), ("info", "versions", [])])
def test_values_that_are_out_of_range_are_refused_by_name(part: str, name: str, value: Any, tmp_path: Path) -> None:
    path = forged(tmp_path / "bad", lambda head, tensors: head[part].__setitem__(name, value))
    with pytest.raises((WireError, ConfigError), match=part if name == "new" else name):
        Recording.load(path)
    if value is None:
        return
    path = forged(tmp_path / "lacking", lambda head, tensors: head[part].pop(name, None))
    with contextlib.suppress(WireError):
        Recording.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "1" * 5000, "{", "[]", "null", '{"format": 1}',
                                  '{"format": 2}'])
def test_metadata_that_is_not_a_recording_is_refused(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "bad", {"hal": text})
    with pytest.raises(WireError):
        Recording.load(tmp_path / "bad")


@pytest.mark.slow
def test_a_file_does_not_choose_what_is_run_or_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes, executor, planes, modules and paths are the caller's, in the library as on the command line."""
    wish = {"tp": 50, "executor": "ray", "control_plane": "ray", "wire": "none", "device": "evilmodule:backend",
            "heartbeat": 1e-6, "memory_fraction": 1e-9}
    path = forged(tmp_path / "wishes", lambda head, tensors: head["engine"].update(wish))
    recording, cpu = Recording.load(path), backends.load("cpu")
    for engine in (recording.engine, recording.config(cpu, device="cpu").engine):
        assert not {name for name, value in wish.items() if getattr(engine, name) == value}
    assert main(["replay", str(path), "--device", "cpu"]) == 0
    assert "not taken from the recording: tp=50, executor=ray, wire=none, control_plane=ray" in capsys.readouterr().out
    assert main(["bisect", str(path), "--device", "cpu"]) == 0
    recording.save(tmp_path / "again")
    assert Recording.load(tmp_path / "again").ignored == recording.ignored

    path = forged(tmp_path / "elsewhere", lambda head, tensors: head["engine"].update(model="/etc"))
    for run in (lambda **o: replay(path, cpu, "cpu", **o), lambda **o: bisect(path, "cpu", "cpu", **o)):
        with pytest.raises(ConfigError, match="--model DIR"):
            run()
        run(model=str(BUNDLED_MODEL))
    Recording.load(forged(tmp_path / "nul", lambda head, tensors: head["engine"].update(model="~\0")))
    path = forged(tmp_path / "other", lambda head, tensors: head["model"].update(hidden_size=2**20))
    with pytest.raises(ConfigError, match="of another model"):
        replay(path, cpu, "cpu")
    with pytest.raises(CapacityError, match="weights"):
        replay(forged(path, lambda head, tensors: head["model"].update(vocab_size=2**24), path), cpu, "cpu",
               random_weights=True)
    path = forged(tmp_path / "random", lambda head, tensors: head["engine"].update(random_weights=True))
    with pytest.raises(ConfigError, match="--random-weights"):
        replay(path, cpu, "cpu")
    assert main(["replay", str(path), "--device", "cpu", "--random-weights"]) == 1  # its weights were others


def test_options_that_the_steps_do_not_fit_are_refused() -> None:
    cpu = backends.load("cpu")
    for option in ({"max_num_seqs": 1}, {"max_model_len": 8}, {"max_num_batched_tokens": 4}, {"num_blocks": 2}):
        with pytest.raises(WireError, match="cannot be run"):
            replay(GREEDY, cpu, "cpu", **option)


def test_a_cache_needs_no_more_blocks_than_are_used(tmp_path: Path) -> None:
    """A recording of a device with room for a million blocks replays on one that has room for a hundred."""
    def far_apart(head: Head, tensors: Tensors) -> None:
        head["engine"]["num_blocks"] = 10**8
        for name, tensor in tensors.items():
            if name.endswith("request.new_blocks") or name.endswith("input.block_tables"):
                tensor.mul_(1_000_003)
            elif name.endswith("input.slot_mapping"):
                tensors[name] = tensor // 4 * 1_000_003 * 4 + tensor % 4

    path = forged(tmp_path / "far", far_apart)
    assert Recording.load(path).engine.num_blocks == Recording.load(GREEDY).engine.num_blocks
    comparison = replay(path, backends.load("cpu"), "cpu")
    assert [s.flips for s in comparison.steps] == [s.flips for s in replay(GREEDY, backends.load("cpu"), "cpu").steps]


# In each step of the bundled model (4 layers): which call is spoilt, and what bisect must name.
PLANTS = [("rms_norm 0", 0, "layers.0.before_attention"),
          ("linear 0", 0, "layers.0.attention.qkv"), ("linear 5", 1, "layers.1.attention.out"),
          ("linear 14", 3, "layers.3.mlp.gate_up"), ("linear 11", 2, "layers.2.mlp.down"), ("linear 16", None, "head"),
          ("rotary 2", 2, ""), ("silu_mul 1", 1, ""), ("add_rms_norm 4", 2, "layers.2.before_mlp"),
          ("attention 3", 3, ""), ("add_rms_norm 7", None, "final_norm")]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "layer", "name"), PLANTS)
def test_bisect_names_the_planted_operation(monkeypatch: pytest.MonkeyPatch, what: str, layer: int | None,
                                            name: str) -> None:
    monkeypatch.setenv("PLANT", what)
    found = bisect(GREEDY, "planted:planted", "cpu").divergence
    assert found is not None
    assert (found.call.layer, found.call.op, found.call.name, found.between) == (layer, what.split()[0], name, False)
    assert found.error > found.tolerance


def test_bisect_sees_inside_operations_that_are_made_of_others() -> None:
    sources = {name: inspect.getsource(method) for name, method in vars(Ops).items() if inspect.isfunction(method)}
    made, found = set[str](), set(_TRACED)
    while found:
        calls = re.compile(rf"self\.({'|'.join(found)})\(")
        found = {name for name, source in sources.items() if calls.search(source)} - made - _TRACED.keys()
        made |= found
    assert {"norm_linear", "mixture"} <= made <= vars(_Traced).keys()


@pytest.mark.slow
def test_bisect_names_an_operation_of_a_mixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, path = str(families.save("qwen3-moe", tmp_path / "model")), tmp_path / "run.safetensors"
    with LLM(model, device="cpu", dtype="float32", async_scheduling=False) as llm:
        record_run(llm, [[5, 6, 7]], SamplingParams(max_tokens=3), path)
    for what, layer in (("experts 1", 2), ("add_rms_norm 0", 0)):  # the layer between them has no experts
        monkeypatch.setenv("PLANT", what)
        found = bisect(path, "planted:planted", "cpu", model=model).divergence
        assert found is not None
        assert (found.call.layer, found.call.op, found.between) == (layer, what.split()[0], False)


def test_bisect_swaps_a_host_block_in_and_out_in_one_step() -> None:
    recording = Recording.load(GREEDY)
    recording.engine = dataclasses.replace(recording.engine, num_cpu_blocks=2)
    device = _Device(recording, backends.load("cpu"), "cpu", None)
    unused = int(recording.steps[0].request.new_blocks.max()) + 1
    for cache, host in zip(device.caches, device.host, strict=True):
        cache[:, unused], host[:, 1] = 2.0, 1.0
    request = recording.steps[0].request
    request.blocks_to_swap_out = np.array([[unused, 1]], np.int32)
    request.blocks_to_swap_in = np.array([[1, unused]], np.int32)
    device.step(request)
    for cache, host in zip(device.caches, device.host, strict=True):
        assert (cache[:, unused] == 1.0).all() and (host[:, 1] == 2.0).all()


def test_two_devices_are_compared_without_a_recording(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PLANT", "linear 5")
    live = ["bisect", "--live", "37+85=", "--max-tokens", "3", "--dtype", "float32"]
    assert main([*live, "--device", "planted:planted"]) == 1
    assert "layer 1, linear (layers.1.attention.out)" in capsys.readouterr().out
    assert main([*live, "--device", "cpu"]) == 0 and "no operation of cpu is off" in capsys.readouterr().out
    assert main(["bisect", "--device", "cpu"]) == 2


def test_bisect_refuses_a_runner_without_parts() -> None:
    with pytest.raises(Exception, match="cannot be bisected"):
        bisect(GREEDY, "null", "cpu")


NUMPY = Path(__file__).parents[2] / "examples" / "numpy-backend"


@pytest.mark.slow
@pytest.mark.parametrize("device", ["telling:composed", "telling:telling"])
def test_bisect_names_the_layer_of_the_numpy_example_that_has_a_fault(monkeypatch: pytest.MonkeyPatch, device: str,
                                                                     ) -> None:
    monkeypatch.syspath_prepend(str(NUMPY))
    right = bisect(GREEDY, device, "cpu")
    assert right.divergence is None and right.calls > 100 and right.flip is None
    assert (device == "telling:telling") == ("names of execute_traced, never told: attention\n" in str(right))
    monkeypatch.setenv("FAULT", "layers.1.mlp.down_proj")
    found = bisect(GREEDY, device, "cpu").divergence
    assert found is not None and (found.step, found.call.layer, found.call.name) == (0, 1, "layers.1.mlp.down")
    # The other way round, the runner that tells values is the one that is right.
    found = bisect(GREEDY, "cpu", device).divergence
    assert found is not None and (found.call.layer, found.call.name.removeprefix("layers.1.")) == (1, "mlp.down")


def test_bisect_refuses_values_that_the_other_runner_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(NUMPY))
    with pytest.raises(BackendError, match=r"no value in common[\s\S]*my_attention\.qkv[\s\S]*attention\.qkv"):
        bisect(GREEDY, "telling:other_names", "cpu")


@pytest.mark.parametrize(("at", "options"), [
    (3, {}), (9, {"max_num_batched_tokens": 7}), (14, {"num_blocks": 34, "num_cpu_blocks": 40, "max_num_seqs": 8}),
    (20, {"num_blocks": 34}), (3, {"steps_per_message": 5}), (5, {"steps_per_message": 4, "num_blocks": 34}),
    pytest.param(6, {"tp": 2}, marks=pytest.mark.slow),
    pytest.param(4, {"tp": 2, "steps_per_message": 3}, marks=pytest.mark.slow)], ids=str)
def test_a_step_that_fails_can_be_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int,
                                            options: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts that share a prefix, drawn and penalised tokens, blocks that are swapped: the failing step, on a fresh
    cache, samples what it sampled before it failed."""
    monkeypatch.setenv("HAL_RECORD_ON_ERROR", str(tmp_path / "failed"))
    monkeypatch.setenv("FAIL_AT", str(at))
    prompt = torch.randint(0, 12, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    params = [SamplingParams(max_tokens=24, ignore_eos=True, temperature=t, repetition_penalty=p, seed=i)
              for i, (t, p) in enumerate(((0.0, 1.0), (0.9, 1.0), (1.3, 1.2), (0.0, 1.4)))]
    with pytest.raises(WorkerError) as error, LLM(device="planted:failing", **{**SMALL, **options}) as llm:
        llm.generate([prompt, [*prompt[:37], 1, 2], prompt, prompt[5:]], params)
    path = next((tmp_path / "failed").glob("*rank-0*"))
    assert f"hal replay {path} --device planted:failing" in str(error.value)
    recording = Recording.load(path)
    assert recording.info["error"] == "ArithmeticError: the device gave up"
    assert (recording.steps[-1].request.num_steps > 1) == ("steps_per_message" in options)
    config = recording.config(backends.load("cpu"), device="cpu")
    executor = make_executor(config.engine, config.model, backends.load("cpu"))
    outputs = [[token for row in executor.execute_model(step.request).result().rows() for token in row]
               for step in recording.steps]
    executor.shutdown()
    if "tp" not in options:
        assert outputs[-1] == planted.FailingRunner.tokens and outputs[-1]
        assert not any(outputs[:-1])
    monkeypatch.delenv("HAL_RECORD_ON_ERROR")
    assert main(["replay", str(path), "--device", "cpu", "--tp", "1"]) == 0
    assert "here: it ran" in capsys.readouterr().out


def test_messages_of_several_steps_are_recorded_replayed_and_bisected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.safetensors"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "steps_per_message": 3}.items()]
    assert main(["record", "--output", str(path), "--device", "cpu", *options, "37+85=", "37+5="]) == 0
    recording = Recording.load(path)
    assert [step.request.num_steps for step in recording.steps] == [1, 3] and recording.engine.steps_per_message == 3
    assert main(["replay", str(path), "--device", "cpu"]) == 0
    assert "equal to the last bit" in capsys.readouterr().out
    monkeypatch.setenv("PLANT", "linear 11")
    found = bisect(path, "planted:planted", "cpu").divergence
    assert found is not None and (found.call.layer, found.call.op) == (2, "linear")
    request = recording.steps[1].request
    request.max_new += 5
    request.num_steps = 8  # further than the rows' blocks
    with pytest.raises(WireError, match="max_new"):
        recording.save(path)
        Recording.load(path)


def test_a_recording_of_an_older_format_is_refused_with_a_hint(tmp_path: Path) -> None:
    path = forged(tmp_path / "old", lambda head, tensors: head.__setitem__("format", 2))
    with pytest.raises(WireError, match=r"format 3.*\n.*the version of hal that made it"):
        Recording.load(path)


def test_a_recording_with_other_step_features_is_refused(tmp_path: Path) -> None:
    path = forged(tmp_path / "other", lambda head, tensors: head["columns"]["float"].append("odd_bonus"))
    with pytest.raises(WireError, match="HAL_FEATURES"):
        Recording.load(path)
