"""A backend in the current folder is found by every command of the installed script, as it is by `python -m hal`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from forks import SCRIPT, Forks

from hal.cli import main

BACKEND = "from hal.testing.null import backend\n"
DEVICE = "mymodule:backend"
# Arguments, and what is printed of the device, which no command can print without having loaded it.
COMMANDS = {
    "generate": (("generate", "--device", DEVICE, "--num-blocks", "64", "1+1="), ""),
    "env": (("env", "--device", DEVICE), "mymodule:backend float32"),
    "bench": (("bench", "--device", DEVICE, "--batch-sizes", "1", "--prompt-len", "4", "--new-tokens", "3"),
              ", null ("),
    "record": (("record", "--device", DEVICE, "--num-blocks", "64", "--output", "run.safetensors", "1+1="), ""),
    "conformance": (("conformance", "--backend", DEVICE, "--level", "0"), "Conformant L0"),
    "replay": (("replay", "run.safetensors", "--device", DEVICE), "equal to the last bit"),
    "bisect": (("bisect", "run.safetensors", "--device", DEVICE), "'null' cannot be bisected"),
    "against": (("bisect", "run.safetensors", "--device", "cpu", "--against", DEVICE), "'null' cannot be bisected")}


@pytest.fixture(scope="module")
def folder(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("empty")
    (made / "mymodule.py").write_text(BACKEND)
    assert forks.run(*COMMANDS["record"][0], cwd=made).status == 0
    return made


@pytest.mark.parametrize("name", COMMANDS)
def test_a_module_of_the_current_folder(name: str, folder: Path, forks: Forks) -> None:
    args, word = COMMANDS[name]
    ended = forks.run(*args, cwd=folder)
    assert word in ended.out.decode() + ended.err and "does not load" not in ended.err
    # bisect finds that this device has no operations; env reports the packages of a source tree that is not installed.
    assert ended.status == 0 or name in ("bisect", "against", "env"), ended.err


@pytest.mark.slow
def test_ranks_find_a_module_of_the_current_folder(folder: Path, forks: Forks) -> None:
    one, two = (forks.run(*COMMANDS["generate"][0], "--tp", tp, cwd=folder) for tp in "12")
    assert (two.status, two.out) == (one.status, one.out) == (0, one.out)


def test_the_folder_is_not_looked_into_without_need(tmp_path: Path, forks: Forks) -> None:
    """Files that happen to have a library's name hide nothing."""
    for name in ("tokenizers", "safetensors", "mymodule"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('not this one')\n")
    ended = forks.run("generate", "--device", "null", "--num-blocks", "64", "1+1=", cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "")


def test_env_says_why_a_device_cannot_be_used(folder: Path, forks: Forks) -> None:
    (folder / "broken.py").write_text("import no_such_library\nbackend = None\n")
    ended = forks.run("env", "--device", "broken:backend", cwd=folder)
    assert ended.status == 1
    out = ended.out.decode()
    assert "broken:backend rejected: " in out and "No module named 'no_such_library'" in out


def test_an_error_names_the_file_or_folder_that_was_imported(folder: Path, forks: Forks) -> None:
    (folder / "hidden").mkdir()
    ended = forks.run("generate", "--device", "hidden:backend", "1+1=", cwd=folder)
    assert f"from the folder {folder / 'hidden'}, which has no __init__.py" in ended.err and ended.status == 1
    ended = forks.run("generate", "--device", "mymodule:other", "1+1=", cwd=folder)
    assert f"mymodule was imported from {folder / 'mymodule.py'}" in ended.err and "rename" in ended.err


@pytest.mark.slow
def test_the_installed_script_itself(folder: Path) -> None:
    done = subprocess.run([SCRIPT, *COMMANDS["generate"][0]], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has no path then."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["generate", "--device", "hal.testing.null:backend", "--num-blocks", "64", "1+1="]) == 0
