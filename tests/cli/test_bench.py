"""hal bench: its table and its JSON say the same, of the shape that was asked for."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from hal import LLM, SamplingParams, profiling
from hal.checkpoints.hf_config import parse_config
from hal.cli import bench, bench_table, main, measure, open_loop, peer
from hal.cli.shapes import SHAPES
from hal.contracts.backend import select
from hal.errors import BackendError
from hal.models import floors
from hal.testing.null import NullRunner

SMALL = ["--device", "cpu", "--prompt-len", "12", "--new-tokens", "4", "--repeat", "2", "--batch-sizes", "1,3"]


def _json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["bench", "--json", *SMALL, *options]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_json_of_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {**SHAPES["tiny"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    report = _json(capsys, "--model-config", str(tmp_path / "config.json"))
    assert report["parameters"] == parse_config(shape).num_params and report["random_weights"]
    assert (report["device"], report["dtype"], report["tp"], report["prompt_len"]) == ("cpu", "float32", 1, 12)
    assert report["measured_bandwidth"] > 1e8 and [r["batch_size"] for r in report["rows"]] == [1, 3]
    for row in report["rows"]:
        assert 0 < row["ttft"] <= row["batch_size"] * 12 / row["prefill_tokens_per_s"] * 1.001
        assert row["share_of_measured"] == pytest.approx(row["achieved_bandwidth"] / report["measured_bandwidth"])
        weights = 4 * report["parameters"]  # each decode step reads them all, and the cache
        assert row["decode_limit"] in ("memory", "arithmetic", "neither") and row["prefill_share"] > 0
        assert (row["prompt_len"], row["new_tokens"], row["repeat"], row["together"]) == (12, 4, 2, True)
        assert row["achieved_bandwidth"] > weights * row["decode_tokens_per_s"] / row["batch_size"]


@pytest.mark.slow
def test_the_load_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {**SHAPES["tiny"], "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4,
             "num_hidden_layers": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert main(["bench", *SMALL, "--expert-loads", "--model-config", str(tmp_path / "config.json")]) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("experts: "))
    assert 1 <= float(line.partition(" has ")[2].partition(" times")[0]) <= 2  # of two choices of four


@pytest.mark.slow
def test_table_of_the_bundled_checkpoint_in_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--tp", "2"]) == 0
    out = capsys.readouterr().out
    assert "add-tiny" in out and "checkpoint" in out and "tp 2" in out and "bfloat16" in out
    rows = [line.split("|") for line in out.splitlines() if line.strip()[:1] in ("1", "3")]
    assert [int(row[0]) for row in rows] == [1, 3] and all(float(cell) >= 0 for row in rows for cell in row[1:-2])


@pytest.mark.slow
def test_a_profile_is_of_further_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.json").write_text("an older one")
    assert main(["bench", *SMALL, "--tp", "2", "--profile", str(tmp_path / "trace.json")]) == 0
    assert f"trace for ui.perfetto.dev: {tmp_path / 'trace.json'}" in capsys.readouterr().out.splitlines()
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("ph") == "X"]
    assert any("linear" in e["name"] for e in events) and not profiling._on
    found = {name: [e for e in events if e["name"] == name and e["cat"] == "user_annotation"] for name in (
        "batch 1", "batch 3", "prepare", "broadcast", "execute", "sample", "fetch")}
    first, second = (found.pop(f"batch {n}") for n in (1, 3))
    assert len(first) == len(second) == 1 and {len(events) for events in found.values()} == {len(found["fetch"])}
    inside = [[o["ts"] <= e["ts"] and e["ts"] + e["dur"] <= o["ts"] + o["dur"] for o in (*first, *second)].count(True)
              for events in found.values() for e in events]
    assert inside == [1] * len(inside)
    assert len(found["fetch"]) == 4 + 4  # new tokens of each batch: all its requests run at once


@pytest.mark.parametrize("file", ["file/trace.json", ".", "/dev/null"])
def test_a_trace_that_cannot_be_written_is_refused_at_once(file: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert main(["bench", *SMALL, "--profile", file, "--device", "nothing is looked for"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("hal: error: --profile cannot be written") and f"got: {file}: " in err
    assert len(list(tmp_path.iterdir())) == 1 and Path("/dev/null").is_char_device()


def test_launched_ranks_write_a_trace_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bench._trace_file(f"{tmp_path}/trace.json") == f"{tmp_path}/trace.json"
    monkeypatch.setenv("RANK", "1")
    assert bench._trace_file(f"{tmp_path}/trace.json") == f"{tmp_path}/rank1-trace.json"


def test_steps_in_which_all_decode_are_timed() -> None:
    from hal.engine.llm import LLM

    with LLM(device="null", max_num_batched_tokens=8, num_blocks=64) as llm:  # prompts are cut into chunks
        run = measure.time_batch(llm, 16, 3, 12, 16)
    assert 0 < run.ttft <= run.prefill and min(run.decode_step, run.tpot) > 0


_BESIDE = ["--model-config", "tiny", "--quantize", "int8", "--peer"]


@pytest.mark.slow
def test_a_peer_takes_turns_and_has_its_ratio(capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_SCRIPT", Path(__file__).with_name("foreign_peer.py"))
    report = _json(capsys, *_BESIDE, "llama.cpp")
    assert report["peer"] == f"a peer with {report['threads']} threads" and not report["random_weights"]
    for row in report["rows"]:
        assert row["peer_decode_tokens_per_s"] == pytest.approx(row["batch_size"])
        assert row["peer_prefill_tokens_per_s"] == pytest.approx(row["batch_size"] * 12)
    shown = bench_table.line(bench_table.Row(**{**report["rows"][1], "decode_tokens_per_s": 4.5}), argparse.Namespace(
        prompt_len=12, new_tokens=4, repeat=2, max_seconds=9))
    assert shown.split()[-2:] == ["3.0", "1.50"]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "words"), [
    ([*_BESIDE, "openvino"], ("openvino is not installed", "pip install openvino-genai gguf", "--peer-python")),
    (["--peer", "transformers", "--max-seconds", "1"], ("transformers has not loaded the model", "--max-seconds")),
    (["--peer", "vllm"], ("vllm ended with status 4", "an illegal instruction")),
    ([*_BESIDE, "vllm"], ("vllm has no such weights", "--quantize int8", "dense weights")),
    (["--peer", "vllm", "--peer-python", "/nowhere/python"], ("--peer-python cannot be run", "/nowhere/python"))])
def test_a_peer_that_cannot_run_is_named(options: list[str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peer, "_SCRIPT", Path(__file__).with_name("foreign_peer.py"))
    assert main(["bench", *SMALL, *options]) == 1
    err = capsys.readouterr().err
    assert "\nhal: error: " in err and all(word in err for word in words)


def test_a_peer_that_ends_between_two_turns_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_SCRIPT", Path(__file__).with_name("foreign_peer.py"))
    with pytest.raises(BackendError, match="vllm ended with status -9"), peer.Peer(
            "vllm", sys.executable, ".", dtype="float32", threads=1, length=9, batch=1, quantize=None,
            scratch=".") as other:
        other._process.kill()
        other._process.wait()
        other.run([[1, 2, 3]], 4)


def test_no_two_weights_that_are_saved_for_a_peer_are_alike(tmp_path: Path) -> None:
    peer.save_checkpoint({**SHAPES["tiny"], "architectures": ["LlamaForCausalLM"]}, tmp_path)
    rows = [x[0].tolist() for x in load_file(tmp_path / "model.safetensors").values() if x.ndim == 2]
    assert len(rows) > 8 and len({tuple(row[:16]) for row in rows}) == len(rows)


@pytest.mark.slow
def test_transformers_as_a_peer_gives_the_tokens_of_ours(tmp_path: Path) -> None:
    shape = {**SHAPES["tiny"], "architectures": ["LlamaForCausalLM"]}
    peer.save_checkpoint(shape, tmp_path)
    ran = []
    with peer.Peer("transformers", sys.executable, str(tmp_path), dtype="float32", threads=1, length=16, batch=2,
                   quantize=None, scratch=str(tmp_path)) as other:
        ran.append(other.run([[1, 2, 3], [4, 5, 6]], 4))
    assert ran[0].together and ran[0].prefill > 0 and "transformers" in other.about
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    theirs = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    with LLM(str(tmp_path), device="cpu") as llm:
        ours, = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert list(ours.token_ids) == theirs


class _Clock:
    """A side whose steps take a time that depends on their tokens alone, under a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_token: float) -> None:
        self.now, self.per_token, self.runs = 0.0, per_token, list[tuple[int, int, int]]()
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> measure.Run:
        start, events = self.now, []
        self.runs.append((len(prompts), len(prompts[0]), new_tokens))
        for computed in (sum(map(len, prompts)), *[len(prompts)] * (new_tokens - 1)):
            self.now += self.per_token * computed
            events += [(self.now - start, i, 1) for i in range(len(prompts))]
        return measure.Run.of(events)


@pytest.mark.parametrize(("per_token", "limit"), [(1e-4, 120.0), (0.02, 120.0), (0.02, 20.0), (0.2, 120.0)])
def test_every_row_is_measured_within_the_time(per_token: float, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch, per_token)
    asked = 128, 64, 3
    found = [(cell, clock.now) for cell in measure.cells([clock], 50, [1, 8, 32], 128, 64, 3, until=limit)]
    assert [cell.batch for cell, _ in found] == [1, 8, 32] and clock.now < limit
    assert 0 < found[0][1] < found[1][1] < found[2][1]  # each row is there before the next begins
    for cell, _ in found:
        assert (cell.prompt_len, cell.new_tokens) <= asked[:2] and 1 <= len(cell.rounds) <= 3
        for run, in cell.rounds:
            assert run.together and run.decode_step == pytest.approx(cell.batch * per_token)
            assert run.prefill == pytest.approx(cell.batch * cell.prompt_len * per_token)
    whole = [(cell.prompt_len, cell.new_tokens, len(cell.rounds)) == asked for cell, _ in found]
    assert whole == [True] * 3 if per_token == 1e-4 else not all(whole)
    assert clock.now > limit / 4 or all(whole)  # the time is used


def test_sides_take_turns_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, names = _Clock(monkeypatch, 1e-3), list[str]()
    sides = [lambda p, n, name=name: (names.append(name), clock(p, n))[1] for name in "ab"]  # type: ignore[misc]
    cell, = measure.cells(sides, 50, [2], 10, 5, 3)
    assert [len(runs) for runs in cell.rounds] == [2, 2, 2] and "".join(names) == "ab" * (len(names) // 2)


def test_tokens_that_come_several_a_step_are_counted_one_by_one() -> None:
    events = [(1.0, 0, 1), (2.0, 1, 1), (3.0, 0, 4), (4.0, 1, 2), (5.0, 0, 4)]
    run = measure.Run.of(events)  # both decode from 2.0 to 4.0, and gain 6 tokens
    assert run.together and run.decode_step == pytest.approx(2.0 * 2 / 6) and run.prefill == 2.0
    assert run.tpot == pytest.approx((4.0 / 8 + 2.0 / 2) / 2)
    apart = measure.Run.of([(1.0, 0, 1), (2.0, 0, 1), (3.0, 1, 1), (4.0, 1, 1)])
    assert not apart.together and apart.decode_step == pytest.approx(3.0 * 2 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--max-model-len", "512"], ["--steps-per-message", "16"],
                                     ["--speculate", "ngram"], ["--kv-cache-bytes", "4000000"]])
def test_every_batch_runs_at_once_whatever_the_engine_is_asked_for(options: list[str],
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    rows = _json(capsys, "--model-config", "tiny", "--new-tokens", "40", "--repeat", "1", *options)["rows"]
    assert [row["batch_size"] for row in rows] == [1, 3] and all(row["together"] for row in rows)
    for row in rows:  # tokens/s of the whole run cannot be twice those of its decoding
        assert row["batch_size"] / row["tpot"] < 2 * row["decode_tokens_per_s"]


def test_a_batch_that_does_not_run_at_once_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--device", "null", "--num-blocks", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("the KV cache or a step of the engine holds fewer") and lines[-2].split()[0] == "3"


def test_limits_name_the_nearest_floor() -> None:
    device = floors.Device(bandwidth=10.0, arithmetic=100.0)
    assert device.limit(1.0, 8.0, 10.0) == ("memory", pytest.approx(0.8))
    assert device.limit(1.0, 1.0, 60.0) == ("arithmetic", pytest.approx(0.6))
    assert device.limit(1.0, 4.0, 30.0) == ("neither", pytest.approx(0.4))
    model = parse_config(SHAPES["qwen2-0.5b"])
    body = model.num_params - 151936 * 896  # the output head is the embedding
    attention = 2 * 24 * 14 * 64 * 2
    assert floors.operations(model, 3, 100) == 3 * (2 * model.num_params + attention * 100)
    assert floors.operations(model, 1, 9, new=9) == 2 * (9 * body + 151936 * 896) + attention * 9 * 5
    assert floors.matrix_rate(select("cpu"), "float32") > 1e8


def test_bandwidth_is_that_of_memory() -> None:
    assert 5e8 < floors.read_bandwidth(select("cpu")) < 5e12


@pytest.mark.slow
@pytest.mark.parametrize(("options", "words"), [
    (["--model-config", "huge"], ("neither a known shape nor", "qwen2-0.5b")),
    (["--model-config", "tiny", "--block-size", "0"], ("block_size is not usable",)),
    (["--model-config", "tiny", "--prompt-len", "5000"], ("max_model_len is longer", "at most 512")),
    (["--model-config", "tiny", "--num-blocks", "1"], ("the KV cache is too small",)),
    (["--model-config", "tiny", "--max-model-len", "15"], ("longer than --max-model-len", "16 tokens")),
    (["--model-config", "tiny", "--max-num-seqs", "2"], ("does not run at once", "at most --max-num-seqs 2"))])
def test_named_error(options: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, *options]) == 1
    err = capsys.readouterr().err
    assert err.startswith("hal: error: ") and all(word in err for word in words)


@pytest.mark.parametrize("options", [["--new-tokens", "2"], ["--peer", "x"], ["--peer", "vllm", "--rate", "1"],
                                     ["--peer", "vllm", "--wire", "none"], ["--model", ".", "--model-config", "tiny"],
                                     ["--batch-sizes", "0"], ["--max-seconds", "0"], ["--batch-sizes", "x"],
                                     ["--repeat", "0"]])
def test_wrong_usage(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert "hal bench: error: " in capsys.readouterr().err


def test_a_config_file_that_nests_too_deeply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"a":' + "[" * 100000 + "]" * 100000 + "}")
    assert main(["bench", *SMALL, "--model-config", str(tmp_path / "config.json")]) == 1
    assert "hal: error: --model-config is neither" in capsys.readouterr().err


@pytest.mark.slow
def test_requests_that_arrive_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "null", "--rate", "200,400", "--requests", "12", "--prompt-len", "6",
                 "--new-tokens", "5", "--num-blocks", "64", "--max-num-seqs", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["rate"] for row in report["rows"]] == [200.0, 400.0] and report["requests"] == 12
    for row in report["rows"]:
        assert 0 < row["ttft_p50"] <= row["ttft_p90"] <= row["ttft_p99"] < row["seconds"]
        assert 0 < row["itl_p50"] <= row["itl_p90"] <= row["itl_p99"] < row["seconds"]
        assert row["tokens_per_s"] == pytest.approx(12 * 5 / row["seconds"])
        assert row["step_host"] > 0 and row["step_execute"] > 0 and row["step_wait"] >= 0
    assert report["rows"][0]["seconds"] > open_loop.arrivals(200, 12)[-1]  # no request began before it had arrived


def test_arrivals_are_a_poisson_process() -> None:
    """The gaps have the mean and the standard deviation of an exponential distribution."""
    gaps = np.diff(open_loop.arrivals(4.0, 20_000), prepend=0.0)
    assert gaps.min() > 0 and abs(gaps.mean() * 4 - 1) < 0.05 and abs(gaps.std() * 4 - 1) < 0.05


def test_the_times_of_an_open_loop_are_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that gives the tokens of a step together. The driver takes 0.1 s a step, the runner 0.03 s, and then
    the output comes after 0.02 s."""
    clock = [0.0]

    def later(seconds: float, then: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            return then(*args, **options)
        return call

    execute, fetch = NullRunner.execute_model, NullRunner.fetch
    monkeypatch.setattr(NullRunner, "execute_model", later(0.03, execute))
    monkeypatch.setattr(NullRunner, "fetch", lambda self, output: later(0.02, fetch(self, output)))
    monkeypatch.setattr(open_loop.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(open_loop.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    with LLM(device="null", num_blocks=64, async_scheduling=False) as llm:
        monkeypatch.setattr(llm, "step", later(0.1, llm.step))
        served = open_loop.serve(llm, 1e-3, 3, 5, 4)
    assert served.tokens == 12 and served.ttft == pytest.approx([0.15] * 3) and served.itl == pytest.approx([0.15] * 9)
    assert served.seconds == pytest.approx(open_loop.arrivals(1e-3, 3)[-1] + 0.6)
    assert served.step == pytest.approx({"host": 0.1, "execute": 0.03, "wait": 0.02})
    shown = open_loop.line(served.row(), 3).split(" | ")
    assert [float(cell) for cell in shown[-3:]] == [100.0, 30.0, 20.0]
    for requests, suffix in ((3, ""), (10, ""), (11, "; the row means nothing: give a larger --max-seconds")):
        below = open_loop.line({**served.row(), "ended": 1}, requests).splitlines()[1]
        assert below == f"       | for --max-seconds: 1 of {requests} requests ended{suffix}"
