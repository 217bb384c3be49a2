"""hal compile."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hal.cli import main


def test_programs_are_compiled_ahead_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.setenv("KEPT", str(tmp_path / "kept"))
    words = ["compile", "--device", "keeping:backend", "--num-blocks", "8", "--max-model-len", "64", "--max-num-seqs"]
    found = []
    for seqs in ("3", "3", "5"):
        assert main([*words, seqs, "--json"]) == 0
        folder, = json.loads(capsys.readouterr().out)["folders"]
        assert folder["what"] == "programs" and folder["path"] == str(tmp_path / "kept")
        found.append((folder["files"], folder["new_files"], folder["bytes"]))
    assert found == [(3, 3, 3000), (3, 0, 3000), (5, 2, 5000)]
    assert main([*words, "6"]) == 0
    assert f"programs: 6 files, 0.0 MB, 1 files new, in {tmp_path / 'kept'}" in capsys.readouterr().out


def test_a_device_that_keeps_no_programs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--device", "null"]) == 1
    assert "device 'null' keeps no compiled programs between starts" in capsys.readouterr().err
