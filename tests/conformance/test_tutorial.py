"""The tutorial's blocks, in order: files are written, commands are run, in a folder of their own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
EXAMPLE = Path(__file__).parents[2] / "examples" / "numpy-backend"


def blocks() -> list[tuple[str, str]]:
    """(info string, content) of every fenced block."""
    return re.findall(r"^```(.+?)\n(.*?)^```$", TUTORIAL.read_text(), re.M | re.S)


def install(package: Path, into: Path) -> None:
    """What pip does, without a network or the environment being changed: entry points are found on the path."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                    "--target", str(into), str(package)], check=True, capture_output=True, timeout=120)


def run(words: list[str], folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(site)})


@pytest.mark.slow
def test_every_block_does_what_the_text_says(tmp_path: Path) -> None:
    folder, site = tmp_path / "my-device", tmp_path / "site"
    ran = []
    for info, content in blocks():
        kind, _, name = info.partition(" file=")
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
            continue
        assert kind == "sh"
        if ran:  # the package is installed already, and the files are new
            shutil.copytree(folder / "my_device", site / "my_device", dirs_exist_ok=True)
        else:
            install(folder, site)
        for line in content.splitlines():
            words = shlex.split(line)
            assert words[0] == "hal"
            if words[1] == "conformance" and "--examples" not in words:
                words += ["--examples", "5"]  # the kit itself is tested with all of them
            done = run(words, folder, site)
            assert done.returncode == 0, done.stdout + done.stderr
            ran.append(done.stdout)
    assert [ran[0], ran[2]] == ["122\n", "122\n"]
    assert "\nConformant L1 (float32)" in ran[1] and "\nConformant L4 (float32); n/a: L1 1 of 7, L2 " in ran[3]
    assert (folder / "out" / "report.html").is_file()
    assert ran[4] == "122\n" and re.search(r"\b0 of \d+ failed", ran[5])


@pytest.mark.slow
def test_the_example_is_found_by_its_entry_point(tmp_path: Path) -> None:
    copied = tmp_path / "source"  # building leaves files beside the sources
    shutil.copytree(EXAMPLE, copied, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    install(copied, tmp_path / "site")
    words = ["hal", "generate", "--device", "numpy", "--dtype", "float32", "37+85="]
    done = run(words, tmp_path, tmp_path / "site")
    assert done.stdout == "122\n", done.stderr


if __name__ == "__main__":  # `make test-tutorial`: the second part, through the whole kit
    with tempfile.TemporaryDirectory() as made:
        for info, content in blocks():
            name = info.partition(" file=")[2]
            if name.startswith("my_device/"):
                (Path(made) / name).parent.mkdir(exist_ok=True)
                (Path(made) / name).write_text(content)
        words = ["-m", "hal", "conformance", "--backend", "my_device.static:backend"]
        sys.exit(subprocess.run([sys.executable, *words], cwd=made).returncode)
