"""Bad input: status 1, one named error that says what to do, no traceback; status 2 for wrong usage."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest

from hal.cli import main
from hal.config import BUNDLED_MODEL
from hal.testing.null import NullBackend

Make = Callable[[Path], list[str]]


def _model(path: Path, **changes: Any) -> Path:
    """The bundled checkpoint, with other values in its config.json."""
    shutil.copytree(BUNDLED_MODEL, path / "model")
    config = json.loads((path / "model" / "config.json").read_text())
    (path / "model" / "config.json").write_text(json.dumps({**config, **changes}))
    return path / "model"


def _no_weights(path: Path) -> list[str]:
    directory = _model(path)
    (directory / "model.safetensors").unlink()
    return ["--model", str(directory), "1+1="]


def _truncated(path: Path) -> list[str]:
    file = _model(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return ["--model", str(file.parent), "1+1="]


def _no_shard(path: Path) -> list[str]:
    directory = _model(path)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    return ["--model", str(directory), "1+1="]


def _architecture(path: Path) -> list[str]:
    return ["--model", str(_model(path, architectures=["UnheardOfForCausalLM"], model_type="unheard-of")), "1+1="]


def _not_json(path: Path) -> list[str]:
    (_model(path) / "config.json").write_text('{"hidden_size": ')
    return ["--model", str(path / "model"), "1+1="]


def _no_tokenizer(path: Path) -> list[str]:
    directory = _model(path)
    for file in directory.glob("tokenizer*"):
        file.unlink()
    return ["--model", str(directory), "1+1="]


def _damaged_tokenizer(path: Path) -> list[str]:
    (_model(path) / "tokenizer.json").write_text("{")
    return ["--model", str(path / "model"), "1+1="]


def _other_vocabulary(path: Path) -> list[str]:
    return ["--model", str(_model(path, vocab_size=17)), "1+1="]


def _more_layers(path: Path) -> list[str]:
    return ["--model", str(_model(path, num_hidden_layers=9)), "1+1="]


def _unknown_rope(path: Path) -> list[str]:
    return ["--model", str(_model(path, rope_scaling={"rope_type": "spiral", "factor": 2.0})), "1+1="]


def _remote_code(path: Path) -> list[str]:
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    return ["--model", str(_model(path, architectures=["OwnForCausalLM"], model_type="own", auto_map=own)), "1+1="]


def _pooling(path: Path) -> list[str]:
    directory = _model(path)
    modules = [{"idx": i, "path": folder, "type": f"sentence_transformers.models.{kind}"}
               for i, (kind, folder) in enumerate((("Transformer", ""), ("Pooling", "1_Pooling")))]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 64, "pooling_mode_cls_token": true}')
    return ["--model", str(directory), "1+1="]


def _recommended(path: Path) -> list[str]:
    (_model(path) / "generation_config.json").write_text('{"do_sample": true, "top_p": 0}')
    return ["--model", str(path / "model"), "1+1="]


def _file(text: str | bytes) -> Make:
    def make(path: Path) -> list[str]:
        file = path / "in.jsonl"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--input", str(file)]

    return make


def _args(*args: str) -> Make:
    return lambda path: list(args)


class _Absent(NullBackend):
    def unavailable(self) -> str:
        return "it is in another room: fetch it"


absent = _Absent()
# What is wrong -> how to ask for it, and words that the message must have.
BAD: dict[str, tuple[Make, tuple[str, ...]]] = {
    "no model directory": (_args("--model", "/nowhere", "1+1="), ("model directory does not exist", "/nowhere")),
    "no safetensors": (_no_weights, ("has no weights", "expected: model.safetensors")),
    "no shard": (_no_shard, ("model-1-of-2.safetensors'", "is missing")),
    "truncated safetensors": (_truncated, ("model.safetensors is damaged", "download it again")),
    "weights of another vocabulary": (_other_vocabulary, ("'model.embed_tokens.weight'", "has the wrong shape",
                                                          "[16, 128]", "[17, 128]")),
    "weights of fewer layers": (_more_layers, ("lacks the tensor 'layers.4.",)),
    "unsupported rope": (_unknown_rope, ("rope type 'spiral', which is not supported", "llama3")),
    "damaged config": (_not_json, ("config.json cannot be read", "expected: a JSON object")),
    "unsupported architecture": (_architecture, ("architecture is not supported", "UnheardOfForCausalLM",
                                                 "a native family, or a causal language model of transformers")),
    "code of the checkpoint": (_remote_code, ("Python code of its own", "OwnForCausalLM", "--trust-remote-code",
                                              "No certificate")),
    "pooling of another size": (_pooling, ("the pooling module does not belong to this model", "got: word_embedding",
                                           "expected: 128")),
    "recommended sampling": (_recommended, ("recommends a sampling parameter", "top_p", "--generation-config none")),
    "damaged tokenizer": (_damaged_tokenizer, ("the tokenizer cannot be read", "give token ids")),
    "no tokenizer": (_no_tokenizer, ("no tokenizer", "prompt_token_ids")),
    "prompt longer than the context": (_args("1" * 600), ("longer than the context", "600 tokens", "at most 511")),
    "prompt longer than max_model_len": (_args("--max-model-len", "8", "12345678+1="), ("longer than the context",
                                                                                    "max_model_len may be up to 512")),
    "max_model_len longer than the context": (_args("--max-model-len", "513", "1+1="), ("max_model_len is longer",
                                                                                      "at most 512")),
    "empty prompt": (_args(""), ("the prompt is empty",)),
    "prompt not UTF-8": (_args(os.fsdecode(b"1+\xff=")), ("the prompt is not a text", "UTF-8")),
    "half a surrogate pair": (_file('{"prompt": "\\ud800"}'), ("line 1: the prompt is not a text",)),
    "empty token ids": (_file('{"prompt_token_ids": []}'), ("line 1: the prompt is empty",)),
    "token id too high": (_file('{"prompt_token_ids": [16]}'), ("line 1: a token id is out of the vocabulary",
                                                                "got: 16", "from 0 to 15")),
    "token id below 0": (_file('\n{"prompt_token_ids": [-1]}'), ("line 2: a token id is out of",)),
    "token id not a number": (_file('{"prompt_token_ids": [1.5]}'), ("prompt_token_ids is not a list of integers",)),
    "temperature nan": (_args("--temperature", "nan", "1+1="), ("temperature is not usable", "got: nan")),
    "temperature negative": (_args("--temperature", "-1", "1+1="), ("temperature is not usable", "at least 0")),
    "temperature infinite": (_args("--temperature", "inf", "1+1="), ("temperature is not",)),
    "temperature of 1e400": (_file('{"prompt": "1+1=", "temperature": 1e400}'), ("line 1: temperature is not",)),
    "max_tokens of 1e400": (_file('{"prompt": "1+1=", "max_tokens": 1e400}'), ("line 1: max_tokens is not",)),
    "infinity": (_file('{"prompt": "1+1=", "temperature": Infinity}'), ("line 1: this is not JSON", "no Infinity")),
    "NaN": (_file('{"prompt": "1+1=", "id": NaN}'), ("line 1: this is not JSON", "JSON has no NaN")),
    "key that occurs twice": (_file('{"prompt": "1+1=", "prompt": "2"}'), ("line 1: a key occurs twice", "'prompt'")),
    "NUL bytes": (_file(b"\0\0\0\0\n"), ("line 1: this is not JSON", r"\x00")),
    "NUL byte in a text": (_file(b'{"prompt": "1\x00"}'), ("line 1: this is not JSON", "control character")),
    "id": (_file('{"prompt": "1+1=", "id": [1]}'), ("line 1: id is neither a text nor an integer", "got: [1]")),
    "id of a truth value": (_file('{"prompt": "1+1=", "id": true}'), ("id is neither", "got: True")),
    "temperature of 400 digits": (_file('{"prompt": "1", "temperature": %s}' % ("9" * 400)), (
        "line 1: temperature is not",)),
    "temperature not a number": (_file('{"prompt": "1+1=", "temperature": "hot"}'), ("line 1: temperature is not",
                                                                                 "got: 'hot'")),
    "seed of 5,000 digits": (_file('{"prompt": "1+1=", "seed": %s}' % ("9" * 5000)), ("line 1: ",)),
    "seed beyond 64 bits": (_args("--seed", str(2**64), "1+1="), ("seed is not usable", str(2**63 - 1))),
    "ignore_eos not a truth value": (_file('{"prompt": "1+1=", "ignore_eos": "no"}'), ("line 1: ignore_eos is not",)),
    "no list of stop texts": (_file('{"prompt": "1+1=", "stop": null}'), ("line 1: stop is not usable", "got: None")),
    "stop texts with meanings": (_file('{"prompt": "1+1=", "stop": {"a": 1}}'), ("line 1: stop is not usable",)),
    "empty stop text": (_args("--stop", "", "1+1="), ("stop holds something that is not a text",)),
    "stop_token_ids": (_file('{"prompt": "1+1=", "stop_token_ids": 1.5}'), ("line 1: stop_token_ids is not usable",)),
    "top_p": (_args("--top-p", "1.5", "1+1="), ("top_p is not usable", "at most 1")),
    "top_k": (_args("--top-k", "-1", "1+1="), ("top_k is not usable",)),
    "min_p": (_args("--min-p", "nan", "1+1="), ("min_p is not usable",)),
    "repetition_penalty": (_args("--repetition-penalty", "0", "1+1="), ("repetition_penalty is not usable",)),
    "presence_penalty": (_args("--presence-penalty", "nan", "1+1="), ("presence_penalty is not usable",)),
    "max_tokens": (_args("--max-tokens", "-1", "1+1="), ("max_tokens is not usable", "from 0")),
    "logprobs": (_args("--logprobs", "-1", "1+1="), ("logprobs is not usable",)),
    "logprobs beyond the vocabulary": (_args("--logprobs", "17", "1+1="), ("logprobs is larger than the vocabulary",)),
    "cache too small for one request": (_args("--num-blocks", "3", "--max-tokens", "200", "1+1="), (
        "the KV cache is too small for one", "num_blocks=3")),
    "no cache at all": (_args("--num-blocks", "1", "1+1="), ("the KV cache is too small",)),
    "unknown device": (_args("--device", "abacus", "1+1="), ("unknown device", "'abacus'", "auto", "cpu", "null")),
    "device without an attribute": (_args("--device", "mymodule:", "1+1="), ("unknown device", "module:attribute")),
    "device that is not here": (_args("--device", f"{__name__}:absent", "1+1="), (
        "not available here", "got: it is in another room", "expected: one of: cpu", "hal env")),
    "device that is something else": (_args("--device", "json:dumps", "1+1="), ("json:dumps is not a backend",)),
    "device that does not load": (_args("--device", "no_such_module:backend", "1+1="), ("does not load",)),
    "dtype that the device lacks": (_args("--device", "cpu", "--dtype", "float16", "1+1="), (
        "no such dtype", "float16", "float32 or bfloat16")),
    "tp that does not divide the heads": (_args("--device", "cpu", "--tp", "3", "1+1="), (
        "tp=3 does not divide", "a multiple of 3", "choose another tp")),
    "more stages than layers": (_args("--device", "cpu", "--pp", "5", "1+1="), ("more pipeline stages than layers",)),
    "tp of 0": (_args("--tp", "0", "1+1="), ("tp is not usable",)),
    "unknown control plane": (_args("--control-plane", "pigeon", "1+1="), ("unknown control_plane",)),
    "unreadable input file": (_args("--input", "/nowhere/in.jsonl"), ("input file cannot be read", "/nowhere/in")),
    "input file is a directory": (_args("--input", "/"), ("input file cannot be read",)),
    "input file not UTF-8": (_file(b'{"prompt": "\xff"}'), ("line 1: this is not UTF-8", "byte 0xff at 12")),
    "input file in UTF-16": (_file('{"prompt": "1+1="}'.encode("utf-16")), ("input file is not UTF-8", "UTF-16")),
    "half a character": (_file(b'{"prompt": "1+1=\xc2'), ("line 1: this is not UTF-8", "byte 0xc2 at 16")),
    "input file without a line end": (_args("--input", "/dev/zero"), ("a line that is too long", "line 1", "64 MiB")),
    "bad JSON line": (_file('\r\n{"prompt": '), ("line 2: this is not JSON",)),
    "deep JSON": (_file("[" * 100_000), ("line 1: this is nested too deeply",)),
    "deep JSON in a parameter": (_file('{"prompt": "1", "stop": ' + "[" * 900 + "]" * 900 + "}"), ("line 1: ",)),
    "deep JSON in a prompt": (_file('{"prompt_token_ids": ' + "[" * 900 + "]" * 900 + "}"), ("line 1: ",)),
    "JSON line not an object": (_file("[1, 2]"), ("line 1: this is not an object",)),
    "line without a prompt": (_file('{"max_tokens": 3}'), ("line 1", "either prompt or prompt_token_ids")),
    "line with both prompts": (_file('{"prompt": "1", "prompt_token_ids": [1]}'), ("either prompt or",)),
    "line with an unknown key": (_file('{"prompt": "1+1=", "temprature": 1}'), ("got: temprature", "temperature")),
    "empty input file": (_file("\n"), ("there is nothing to do",)),
}
USAGE = {"no prompt": [], "unknown option": ["--tempreture", "1", "1+1="], "not a number": ["--top-k", "many", "1+1="],
         "unknown dtype": ["--dtype", "int3", "1+1="], "unknown wire": ["--wire", "pigeon", "1+1="]}
AS_PROCESS = ("truncated safetensors", "prompt longer than the context", "tp that does not divide the heads")


def _check(status: int, out: str, err: str, words: tuple[str, ...]) -> None:
    assert (status, out) == (1, ""), out + err
    assert err.startswith("hal: error: ") and err.count("hal: error:") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, f"{word!r} is not in:\n{err}"


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_named_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = BAD[name]
    status = main(["generate", *make(tmp_path)])
    _check(status, *capsys.readouterr(), words)


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_PROCESS)
def test_named_error_of_a_process(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    done = forked.run([sys.executable, "-m", "hal", "generate", *make(tmp_path)], text=True, capture_output=True,
                      check=False, cwd=tmp_path)
    _check(done.returncode, done.stdout, done.stderr, words)


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *USAGE[name]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: hal") and "Traceback" not in err


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sing"]) == 2
    assert "generate" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["option", "variable"])
def test_traceback_where_asked_for(way: str, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HAL_DEBUG", "1" if way == "variable" else "0")
    assert main(["generate", *(["--traceback"] if way == "option" else []), ""]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "\nhal: error: the prompt is empty" in err


@pytest.mark.parametrize(("command", "words"), [
    (["replay", "{}/none"], ("the recording cannot be read", "/none")),
    (["replay", str(BUNDLED_MODEL / "model.safetensors")], ("is not a recording",)),
    (["bisect", "{}/file", "--device", "cpu"], ("the recording cannot be read", "/file"))])
def test_recordings(command: list[str], words: tuple[str, ...], tmp_path: Path,
                    capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no recording")
    status = main([part.format(tmp_path) for part in command])
    _check(status, *capsys.readouterr(), words)


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors made on purpose are shortened."""
    monkeypatch.setattr("hal.cli.batch.read_jobs", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "--input", "-"])
