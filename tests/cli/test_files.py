"""Paths on the command line: outputs that cannot be written are found first, and replaced as a whole; ~ is expanded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hal import files
from hal.cli import main
from hal.config import BUNDLED_MODEL
from hal.errors import ConfigError

NULL = "--device", "null", "--num-blocks", "64"


def test_a_failure_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("older")
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), files.replacing(path) as temporary:
            temporary.write_text("half of it")
            raise error
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path, link = tmp_path / "file.tar.gz", tmp_path / "link"
    path.write_text("older")
    path.chmod(0o640)
    link.symlink_to(path)
    with files.replacing(link) as temporary:
        temporary.write_text("newer")
        assert path.read_text() == "older"
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".gz")  # some writers go by the suffix
    assert link.is_symlink() and path.read_text() == "newer" and path.stat().st_mode & 0o777 == 0o640
    assert set(tmp_path.iterdir()) == {path, link}


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "a" / "b" / "new") as temporary:
            temporary.write_text("")
    finally:
        os.umask(umask)
    assert (tmp_path / "a" / "b" / "new").stat().st_mode & 0o777 == 0o640


def test_checking_changes_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("older")
    files.check_writable("--output", tmp_path / "file")
    files.check_writable("--output", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "older"


UNWRITABLE = {"folder": ".", "device": "/dev/null", "below a file": "file/x", "name too long": "x" * 300,
              "read-only": "locked", "folder that takes no files": "/proc/x", "empty": ""}


@pytest.mark.parametrize(("command", "name"), [
    *((command, name) for command in ("record", "bench") for name in UNWRITABLE),
    *(("conformance", name) for name in UNWRITABLE if name not in ("folder", "empty"))])  # it asks for a folder
def test_an_unwritable_output_is_found_before_the_work(command: str, name: str, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("older")
    (tmp_path / "locked").write_text("older")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))  # of root
    path = UNWRITABLE[name]
    args = {"record": ["record", "--output", path, "1+1="], "bench": ["bench", "--profile", path],
            "conformance": ["conformance", "--report", path]}[command]
    device = "--backend" if command == "conformance" else "--device"
    assert main([*args, device, "nothing is looked for"]) == 1
    out, err = capsys.readouterr()
    option = {"record": "--output", "bench": "--profile", "conformance": "--report"}[command]
    assert out == "" and err.startswith(f"hal: error: {option} cannot be written\n  got: {path}")
    assert (tmp_path / "file").read_text() == (tmp_path / "locked").read_text() == "older"
    assert Path("/dev/null").is_char_device() and len(list(tmp_path.iterdir())) == 2


def test_a_recording_that_fails_leaves_the_older_one(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.safetensors"
    assert main(["record", *NULL, "--output", str(path), "1+1="]) == 0
    older = path.read_bytes()

    def full(tensors: object, name: str, head: object) -> None:
        Path(name).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hal.recording.format.save_file", full)
    capsys.readouterr()
    assert main(["record", *NULL, "--output", str(path), "1+1="]) == 1
    assert "the recording cannot be written" in capsys.readouterr().err
    assert path.read_bytes() == older and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_home_directory_in_every_option_that_names_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    shutil.copytree(BUNDLED_MODEL, home / "model")
    (home / "in.jsonl").write_text('{"prompt": "37+85="}')
    (home / "xfail.json").write_text('{"xfail": []}')
    cpu = "--device=cpu", "--num-blocks=64", "--model=~/model"
    assert main(["generate", *cpu, "--input=~/in.jsonl"]) == 0
    assert capsys.readouterr().out == "122\n"
    assert main(["record", *cpu, "--output=~/run.safetensors", "37+85="]) == 0
    assert main(["replay", "--device=cpu", "--model=~/model", "~/run.safetensors"]) == 0
    assert main(["bisect", "--device=cpu", "--model=~/model", "~/run.safetensors"]) == 0
    assert main(["conformance", "--backend=null", "--level=0", "--report=~/report", "--xfail=~/xfail.json"]) == 0
    small = "--batch-sizes=1", "--prompt-len=4", "--new-tokens=3", "--repeat=1"
    assert main(["bench", "--device=cpu", *small, "--model-config=~/model/config.json", "--profile=~/trace.json"]) == 0
    made = {"model", "in.jsonl", "xfail.json", "run.safetensors", "report", "trace.json"}
    assert {p.name for p in home.iterdir()} == made and not list(elsewhere.iterdir())
    assert json.loads((home / "trace.json").read_text())["traceEvents"]


def test_the_file_of_expected_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad ones are refused before any case runs; a byte order mark is no fault."""
    path = tmp_path / "xfail.json"
    case = {"case": "L0/none", "reason": "r", "link": "l"}
    for content in (b"", b"\xff", b"[]", b"{}", b'{"xfail": 1}', b"[" * 100_000, b'{"xfail": [{"case": 1}]}',
                    json.dumps({"xfail": [{**case, "case": 1}]}).encode()):
        path.write_bytes(content)
        assert main(["conformance", "--backend", "null", "--level", "0", "--xfail", str(path)]) == 1
        assert "the file of expected failures cannot be used" in capsys.readouterr().err
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"xfail": [case]}).encode())
    assert main(["conformance", "--backend", "null", "--level", "0", "--xfail", str(path)]) == 0


@pytest.mark.parametrize(("options", "status", "word"), [
    (["--seed", "-1"], 2, "-1 is not from 0"), (["--seed", str(2**63)], 2, "is not from 0 to 2**63 - 1"),
    (["--examples", "0"], 2, "0 is not above 0"), (["--tolerance", "model:float32=nan"], 1, "a finite number"),
    (["--tolerance", "model:float32=inf"], 1, "a finite number")])
def test_numbers_that_no_case_can_use_are_refused(options: list[str], status: int, word: str,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--backend", "null", "--level", "0", *options]) == status
    out, err = capsys.readouterr()
    assert out == "" and word in err


def test_the_error_names_what_was_given() -> None:
    with pytest.raises(ConfigError, match="--output cannot be written\n  got: /dev/null: "):
        files.check_writable("--output", Path("/dev/null"))
