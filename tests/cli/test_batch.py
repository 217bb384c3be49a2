"""Requests from a file: one that fails does so alone, and what has finished is written."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import Forks, lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hal.cli import batch, main
from hal.cli.results import Results
from hal.engine.request_output import RequestOutput
from hal.errors import RequestError
from hal.sampling.params import SamplingParams

Generate = Callable[..., tuple[int, list[dict[str, Any]], str]]
GOOD = b'{"prompt": "1+1=", "id": "good"}'


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Generate:
    """Status, the objects of --json, and stderr, for an input file of these bytes."""

    def run(content: bytes, *options: str) -> tuple[int, list[dict[str, Any]], str]:
        (tmp_path / "in.jsonl").write_bytes(content)
        status = main(["generate", "--device", "cpu", "--num-blocks", "64", "--json", "--input",
                       str(tmp_path / "in.jsonl"), *options])
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return run


def test_a_bad_line_fails_alone(generate: Generate) -> None:
    content = b"\n".join([GOOD, b'{"prompt": ', b'{"prompt": "\xff"}', b"", b'{"id": 7, "prompt_token_ids": [16]}',
                          b'{"id": "x", "prompt": "3+4=", "temperature": -1}', b'{"prompt": "37+85="}'])
    status, found, err = generate(content, "--ordered")
    assert status == 1
    assert [r["index"] for r in found] == [0, 1, 2, 3, 4, 5]
    assert [r.get("id") for r in found] == ["good", None, None, 7, "x", None]
    assert [r.get("text") for r in found] == ["2", None, None, None, None, "122"]
    for r, place in zip(found[1:5], (2, 3, 5, 6), strict=True):
        assert r["finish_reason"] == "error" and f"in.jsonl, line {place}: " in r["error"]
    assert err.count("hal: error: ") == 4
    assert all(err.count(f"in.jsonl, line {place}: ") == 1 for place in (2, 3, 5, 6))


def test_a_bad_prompt_of_several_on_the_command_line_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--device", "cpu", "--num-blocks", "64", "1+1=", "", "3+4="]) == 1
    out, err = capsys.readouterr()
    assert out == "> 1+1=\n2\n> 3+4=\n7\n" and err.startswith("hal: error: the prompt is empty")


def test_nothing_is_loaded_where_no_line_is_a_request(generate: Generate) -> None:
    status, found, err = generate(b"[]\n{}\n", "--device", "nothing is looked for")
    assert (status, [r["finish_reason"] for r in found], err.count("error")) == (1, ["error"] * 2, 2)


@pytest.mark.parametrize(("first", "end"), [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"\xef\xbb\xbf", b"\r\n")])
def test_marks_and_line_ends_of_other_systems(first: bytes, end: bytes, generate: Generate) -> None:
    whole = first + GOOD + end + end + first + GOOD + end  # two files that were joined
    status, found, err = generate(whole)
    assert (status, [r["text"] for r in found], err) == (0, ["2", "2"], "")
    assert generate(first + end)[0] == 1  # nothing is in it


def test_results_are_written_as_they_finish_unless_ordered(generate: Generate) -> None:
    content = b"".join(b'{"prompt": "1+1=", "ignore_eos": true, "max_tokens": %d, "id": %d}\n' % (n, n)
                       for n in (30, 3, 20, 1))
    by_end = [1, 3, 20, 30]
    status, found, _ = generate(content)
    assert status == 0 and [r["id"] for r in found] == by_end and [r["index"] for r in found] == [3, 1, 2, 0]
    status, ordered, _ = generate(content, "--ordered")
    assert status == 0 and ordered == sorted(found, key=lambda r: r["index"])


def test_results_that_wait_for_another_are_written_when_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Results(4, as_json=True, ordered=True) as results:
        for index in (3, 1, 0):
            results.finish(index, RequestOutput(0, 9, "", [], text=str(index), finish_reason="stop"))
        assert [json.loads(line)["index"] for line in capsys.readouterr().out.splitlines()] == [0, 1]
        raise KeyboardInterrupt
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["3"]


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "prompt", "top_k", "stop", ""]), inner), max_leaves=6)
LINES = st.lists(st.binary(max_size=40) | st.sampled_from([GOOD, b"", b"\xef\xbb\xbf" + GOOD, GOOD + b"\r"])
                 | VALUES.map(lambda value: json.dumps(value).encode()), max_size=5)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LINES.map(b"\n".join))
def test_no_file_raises_anything_but_its_lines_errors(content: bytes) -> None:
    """Each line that is not blank is a request, or an error that names it; the others are as if it were not there."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        content = b"\n" + content
    found = list(batch._parse("file", io.BytesIO(content), {}, False))
    told = [line.strip() for line in content.split(b"\n")]
    places = [n for n, line in enumerate(told, 1) if line and line != b"\xef\xbb\xbf"]
    assert len(found) == len(places)
    for place, job in zip(places, found, strict=True):
        if isinstance(job, batch.Refused):
            assert isinstance(job.error, RequestError) and job.error.what.startswith(f"file, line {place}: ")
        else:
            assert job.origin == f"file, line {place}"
        if told[place - 1].removeprefix(b"\xef\xbb\xbf") == GOOD:
            assert job == batch.Job("1+1=", SamplingParams(), f"file, line {place}", "good")


def _endless(path: Path) -> str:
    """One request that ends soon, and more than a test will wait for."""
    short = '{"prompt": "1+1=", "id": "short"}\n'
    path.write_text(short + '{"prompt": "1+1=", "ignore_eos": true, "max_tokens": 500}\n' * 5000)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"),
                                            (signal.SIGHUP, "the terminal is gone")])
def test_a_signal_keeps_what_has_finished(kill: signal.Signals, word: str, forks: Forks, tmp_path: Path) -> None:
    ended = forks.run("generate", "--device", "null", "--json", "--num-blocks", "600", "--input",
                      _endless(tmp_path / "in.jsonl"), kill=kill)
    assert (ended.status, ended.err) == (128 + kill, f"hal: {word}\n")
    assert lines(ended.out)[0]["id"] == "short" and len(lines(ended.out)) < 5000


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_that_prints_at_its_end(kill: signal.Signals, forks: Forks, tmp_path: Path) -> None:
    def catches(out: bytes, pid: int) -> bool:
        caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
        return bool(int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1)

    (tmp_path / "old.safetensors").write_text("older")
    ended = forks.run("record", "--device", "null", "--num-blocks", "600", "--output", "old.safetensors",
                      "--ignore-eos", "--max-tokens", "500", *["1+1="] * 500, cwd=tmp_path, kill=kill, when=catches)
    assert ended.status == 128 + kill and ended.err.startswith("hal: ") and ended.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_text() == "older"


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_ranks_too(kill: signal.Signals, forks: Forks, tmp_path: Path) -> None:
    ranks: list[str] = []

    def first_line(out: bytes, pid: int) -> bool:
        ranks[:] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return out != b""

    ended = forks.run("generate", "--device", "null", "--tp", "2", "--json", "--num-blocks", "600", "--input",
                      _endless(tmp_path / "in.jsonl"), kill=kill, when=first_line)
    assert ended.status == 128 + kill and ended.err.count("\n") == 1
    assert lines(ended.out)[0]["id"] == "short" and len(ranks) == 1
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
