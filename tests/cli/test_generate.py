"""hal generate: what it prints, for each way of asking."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from safetensors.torch import load_file, save_file

from hal.cli import main

Run = Callable[..., list[str]]
THREE, PLUS, TWO, EOS = 7, 14, 6, 2  # token ids of the bundled model


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Run:
    """The lines on stdout; nothing is on stderr."""

    def run(*args: object) -> list[str]:
        status = main(["generate", "--device", "cpu", "--num-blocks", "64", *map(str, args)])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out.splitlines()

    return run


def _lines(path: Path, *requests: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n\n" for r in requests))  # blank lines are skipped
    return path


def test_one_prompt_prints_its_answer_alone(generate: Run) -> None:
    assert generate("37+85=") == ["122"]


def test_several_answers_are_printed_below_their_prompts(generate: Run) -> None:
    assert generate("37+85=", "123+456=") == ["> 37+85=", "122", "> 123+456=", "579"]


def test_json_has_a_line_per_prompt(generate: Run) -> None:
    second, first = map(json.loads, generate("--json", "999+1=", "3+2="))  # the shorter answer is there first
    assert (first["index"], first["text"]) == (0, "1000")
    assert second == {"index": 1, "prompt": "3+2=", "prompt_token_ids": [THREE, PLUS, TWO, 15], "token_ids": [9, EOS],
                      "text": "5", "finish_reason": "stop"}


def test_a_prompt_that_ends_with_an_error(checkpoint: Callable[[str], Path], tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """The others are printed; the error is on stderr, in its line of --json, and in the exit code."""
    shutil.copytree(checkpoint("qwen3"), tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["model.embed_tokens.weight"][9] = math.nan
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    path = _lines(tmp_path / "in.jsonl", {"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [5, 9, 7]})
    command = ["generate", "--device", "cpu", "--num-blocks", "64", "--max-tokens", "2", "--input", str(path),
               "--model", str(tmp_path / "damaged")]
    assert main(command) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [lines[0], *lines[2:]] == ["> 5 6 7", "> 5 9 7", ""] and len(lines[1].split()) == 2
    assert err.startswith(f"hal: error: {path}, line 3: request 1 ended before output token 0: ") and "dtype" in err
    assert main([*command, "--json", "--ordered"]) == 1
    out, err = capsys.readouterr()
    good, bad = map(json.loads, out.splitlines())
    assert "error" not in good and len(good["token_ids"]) == 2
    assert (bad["finish_reason"], bad["token_ids"]) == ("error", []) and bad["error"] in err


def test_input_file_with_overrides(generate: Run, tmp_path: Path) -> None:
    path = _lines(tmp_path / "in.jsonl", {"prompt": "37+85="}, {"prompt": "37+85=", "max_tokens": 2},
                  {"prompt_token_ids": [THREE, PLUS, TWO, 15], "stop_token_ids": [9]})
    lines = [json.loads(line) for line in generate("--json", "--ordered", "--max-tokens", 3, "--input", path, "1+1=")]
    assert [(r["prompt"], r["text"], r["finish_reason"]) for r in lines] == [
        ("1+1=", "2", "stop"), ("37+85=", "122", "length"), ("37+85=", "12", "length"), (None, "", "stop")]
    assert lines[3]["token_ids"] == [9]


def test_standard_input(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "250+250="}\n')))
    assert generate("--input", "-") == ["500"]


def test_logprobs(generate: Run) -> None:
    line, = map(json.loads, generate("--json", "--logprobs", 3, "--prompt-logprobs", 0, "37+85="))
    assert [entry["token_id"] for entry in line["logprobs"]] == line["token_ids"]
    for entry in line["logprobs"]:
        values = [value for _, value in entry["top"]]
        assert entry["top"][0] == [entry["token_id"], entry["logprob"]]  # greedy takes the likeliest
        assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] <= 0
    assert line["prompt_logprobs"][0] is None
    assert [entry["token_id"] for entry in line["prompt_logprobs"][1:]] == line["prompt_token_ids"][1:]


@pytest.mark.parametrize(("options", "text", "reason"), [
    (["--stop", "2"], "1", "stop"), (["--stop", "9", "--stop", "22"], "1", "stop"),
    (["--stop-token-ids", str(TWO)], "1", "stop"), (["--max-tokens", "1"], "1", "length"),
    (["--ignore-eos", "--max-tokens", "5"], "122", "length")])
def test_where_output_ends(generate: Run, options: list[str], text: str, reason: str) -> None:
    line, = map(json.loads, generate("--json", *options, "37+85="))
    assert (line["text"][:3], line["finish_reason"]) == (text, reason)


def test_a_model_without_tokenizer_works_with_token_ids(generate: Run, checkpoint: Callable[[str], Path],
                                                        tmp_path: Path) -> None:
    directory, prompt = checkpoint("llama2-mha"), checkpoints.prompts()[0]
    expected, _ = checkpoints.greedy(checkpoints.load(directory), prompt, 8)
    path = _lines(tmp_path / "in.jsonl", {"prompt_token_ids": prompt})
    options = "--model", directory, "--max-tokens", 8, "--input", path
    assert generate(*options) == [" ".join(map(str, expected))]
    line, = map(json.loads, generate("--json", *options))
    assert (line["token_ids"], line["text"], line["prompt"]) == (expected, "", None)


def test_sampling_options_reach_the_sampler(generate: Run) -> None:
    options = "--json", "--temperature", 8, "--max-tokens", 12, "--ignore-eos", "37+85="
    seeded = [generate("--seed", seed, *options) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert json.loads(generate("--seed", 1, "--top-k", 1, *options)[0])["text"].startswith("122")


@pytest.mark.parametrize("options", [[], ["--json", "--ordered"]])
def test_text_that_the_output_cannot_encode(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["generate", "--device", "cpu", "--num-blocks", "64", *options, "é1+1=", "1+1="]) == 0
    out.seek(0)
    lines = out.read().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["é1+1=", "1+1="] if options else lines[0] == r"> \xe91+1="


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = "hal generate --device cpu --tp 2 --num-blocks 64 37+85= 123+456="
    done = subprocess.run([sys.executable, "-m", *command.split()], text=True, capture_output=True, check=False,
                          cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "> 37+85=\n122\n> 123+456=\n579\n", "")
