"""Standard streams that are closed, full, or read by nobody, and of any encoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forks import BROKEN, CLOSED, READ_ONLY, Forks, lines

NULL = "--device", "null", "--num-blocks", "64"
COMMANDS = {
    "help": ("--help",), "version": ("--version",), "generate": ("generate", *NULL, "1+1="),
    "json": ("generate", "--json", *NULL, "1+1=", "2+2="), "env": ("env",), "conformance": ("conformance", "--list"),
    "bench": ("bench", "--device", "null", "--batch-sizes", "1", "--prompt-len", "4", "--new-tokens", "4"),
    "record": ("record", *NULL, "--output", "run.safetensors", "1+1="),
    "replay": ("replay", "run.safetensors", "--device", "null")}


@pytest.fixture(scope="module", autouse=True)
def recording(forks: Forks) -> Path:
    assert forks.run(*COMMANDS["record"]).status == 0
    return forks.scratch / "run.safetensors"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_stdout_is_named(name: str, forks: Forks) -> None:
    ended = forks.run(*COMMANDS[name], stdout=CLOSED)
    assert ended.status == 1
    assert ended.err.startswith("hal: error: the standard output is closed\n") and "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_stdout_is_an_error(name: str, forks: Forks) -> None:
    ended = forks.run(*COMMANDS[name], stdout="/dev/full")
    assert ended.status == 1
    assert "hal: error: " in ended.err and "No space left" in ended.err and "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_of_stdout_that_went_away_is_no_error(name: str, forks: Forks) -> None:
    ended = forks.run(*COMMANDS[name], stdout=BROKEN)
    assert (ended.status, ended.err) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize("stdin", ["/dev/null", CLOSED])
@pytest.mark.parametrize("stderr", ["", CLOSED, "/dev/full", BROKEN])
def test_the_answer_needs_stdout_alone(stdin: str, stderr: str, forks: Forks) -> None:
    ended = forks.run("generate", "--device", "cpu", "--num-blocks", "64", "37+85=", stdin=stdin, stderr=stderr)
    assert (ended.status, ended.out) == (0, b"122\n")


@pytest.mark.slow
@pytest.mark.parametrize("stderr", [CLOSED, "/dev/full", BROKEN])
def test_an_error_that_cannot_be_written_still_has_its_exit_code(stderr: str, forks: Forks) -> None:
    for status, args in ((1, ("generate", *NULL, "")), (1, ("replay", "/nowhere")), (2, ("sing",)), (2, ("generate",))):
        ended = forks.run(*args, stderr=stderr)
        assert (ended.status, ended.out) == (status, b"")
    assert forks.run(*COMMANDS["env"], stdout=CLOSED, stderr=stderr).status == 1
    assert forks.run(*COMMANDS["env"], stdin=CLOSED, stdout=CLOSED, stderr=stderr).status == 1


def test_a_closed_stdin_is_no_empty_file(forks: Forks) -> None:
    ended = forks.run("generate", *NULL, "--input", "-", stdin=CLOSED)
    assert ended.status == 1 and ended.err.startswith("hal: error: the standard input is closed\n")


def test_stdout_opened_for_reading_is_named_before_the_work(forks: Forks) -> None:
    ended = forks.run("generate", "--device", "nothing is looked for", "1+1=", stdout=READ_ONLY)
    assert ended.status == 1 and ended.err.startswith("hal: error: the standard output is not open for writing\n")


def test_printed_text_gets_into_no_file(forks: Forks, recording: Path) -> None:
    """A file that is opened where a stream was closed would get the stream's descriptor."""
    args = "record", *NULL, "--output", "closed.safetensors", "1+1="
    assert forks.run(*args, stdin=CLOSED, stderr=CLOSED).status == 0
    assert forks.run("replay", "closed.safetensors", "--device", "null").status == 0


TEXT = "é²😀 \u2028"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252", "utf-16"])
def test_json_lines_are_utf8_in_every_locale(encoding: str, forks: Forks, tmp_path: Path) -> None:
    request = json.dumps({"prompt": TEXT, "id": TEXT, "max_tokens": 1}, ensure_ascii=False) + "\n"
    (tmp_path / "in.jsonl").write_text(request, encoding="utf-8")
    for source in ("-", str(tmp_path / "in.jsonl")):
        ended = forks.run("generate", *NULL, "--json", "--input", source, stdin=str(tmp_path / "in.jsonl"),
                          encoding=encoding)
        assert (ended.status, ended.err) == (0, "")
        found, = map(json.loads, ended.out.decode(encoding if encoding == "utf-16" else "utf-8").strip().split("\n"))
        assert (found["prompt"], found["id"]) == (TEXT, TEXT)


def test_half_a_surrogate_pair_in_an_id_stays_json(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "1+1=", "id": "\\ud800"}')
    found, = lines(forks.run("generate", *NULL, "--json", "--input", str(tmp_path / "in.jsonl")).out)
    assert found["id"] == "\ud800"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_needs_more_than_ascii(name: str, forks: Forks) -> None:
    ended = forks.run(*COMMANDS[name], encoding="ascii")
    assert ended.status == 0 and ended.out.isascii() and "Traceback" not in ended.err
