"""The documents' code runs, and the files and options that they name exist."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from line_budget import code_lines

from hal.cli import build_parser, main

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "architecture", "backends", "debugging", "distributed", "engine", "runner")))
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS[0].read_text(), re.DOTALL | re.MULTILINE)
PRINTS = (["['122', '579']", "1000"], ["0 122", "Stats("], ["[5, 6, 6, 2]"], [], ["input_ids", "num_seqs + 1"])


def test_every_block_is_run() -> None:
    assert len(BLOCKS) == len(PRINTS)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PRINTS)))
def test_block(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("readme_block")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where declarations look their annotations up
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(BLOCKS[number], f"README.md, python block {number}", "exec"), module.__dict__)
        if hasattr(module, "backend"):
            assert main(["generate", "--device", "readme_block:backend", "--dtype", "float32", "37+85="]) == 0
            assert out.getvalue() == "122\n"
    for text in PRINTS[number]:
        assert text in out.getvalue()


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_what_is_named_exists(document: Path) -> None:
    text = document.read_text()
    for name in re.findall(r"`((?:hal|workers|runners|tests|benchmarks|training|docs|examples)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (document.parent / name).exists(), name
    for module in re.findall(r"`(hal(?:\.[a-z_]+)+)(?:\.[A-Z]\w*)?`", text):
        if module != "hal.backends":  # the group of entry points
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), module


COMMANDS = sorted({line.strip() for document in DOCS for line in re.findall(
    r"^(?:    )?(?:HAL_STRICT=1 )?(hal [a-z]+ [^#\n]*)", document.read_text(), re.MULTILINE)})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command: str) -> None:
    import shlex

    args = build_parser().parse_args(shlex.split(command)[1:])
    assert callable(args.run)


def test_options_named_exist() -> None:
    parser = io.StringIO()
    with contextlib.redirect_stdout(parser):
        for command in ("generate", "replay", "record", "bisect", "conformance", "bench", "env"):
            with pytest.raises(SystemExit):
                build_parser().parse_args([command, "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", parser.getvalue()))
    named = {name for document in DOCS for name in re.findall(r"`(?:hal \w+ )?(--[a-z-]+)", document.read_text())}
    assert named and named <= known, named - known


def test_the_reading_path_is_short_and_its_line_counts_are_right() -> None:
    path = re.findall(r"^\| (\d+) \| `([\w/.]+)` \| (\d+) \|", DOCS[0].read_text(), re.MULTILINE)
    sizes = {name: code_lines(ROOT / name) for _, name, _ in path}
    assert [int(number) for number, _, _ in path] == list(range(1, len(path) + 1)) and len(sizes) == len(path) > 10
    assert sum(sizes.values()) <= 1200, sizes
    wrong = {name: sizes[name] for _, name, said in path if abs(sizes[name] - int(said)) > 25}
    assert not wrong, f"lines of code now: {wrong}"
    told = int(re.search(r"about ([\d,]+) lines of code", DOCS[0].read_text())[1].replace(",", ""))  # type: ignore[index]
    assert abs(sum(sizes.values()) - told) <= 50, sum(sizes.values())


@pytest.mark.parametrize("folder", ["hal", "workers", "runners"])
def test_architecture_names_every_folder(folder: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    inner = [path for path in (ROOT / folder).iterdir() if path.is_dir() and not path.name.startswith("__")]
    assert inner and all(f"`{folder}/{path.name}`" in text for path in inner), [path.name for path in inner]
