"""hal env: what it reports, and that it notices packages of another distribution."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hal.cli import identity, main
from hal.cli.env import survey


def test_json_has_everything_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"hal", "packages", "machine", "libraries", "variables", "backends"}
    assert set(report["packages"]) == {"hal", "runners", "workers"}
    assert all(p["problem"] is None and p["location"] == p["expected"] for p in report["packages"].values())
    assert {"cpu", "null"} <= set(report["backends"])
    for backend in report["backends"].values():
        assert backend["available"] == (backend["reason"] is None)
    assert report["backends"]["null"]["dtypes"] and report["libraries"]["torch"]
    assert report["machine"]["cpus"] >= 1


def test_text_names_backends_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("hal ", "runners  ok", "workers  ok", "python 3.", "torch ", "\n  cpu ", "\n  null "):
        assert word in text


def test_a_rejected_backend_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    from hal.testing.null import NullBackend

    monkeypatch.setattr(NullBackend, "unavailable", lambda self: "there is no such thing: buy one")
    assert survey()["backends"]["null"]["reason"] == "there is no such thing: buy one"
    assert main(["env"]) == 0
    assert "null     rejected: there is no such thing: buy one" in capsys.readouterr().out


def test_home_directory_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    home = Path(identity.__file__).resolve().parents[3]
    monkeypatch.setenv("HOME", str(home))
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    assert "~/" in text and (str(home) == "/" or str(home) not in text)


def _foreign(directory: Path) -> dict[str, str]:
    (directory / "workers").mkdir()
    (directory / "workers" / "__init__.py").write_text("hello = 1\n")
    return {**os.environ, "PYTHONPATH": str(directory)}


@pytest.mark.slow
def test_a_foreign_package_in_front_is_reported(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "hal", "env", "--json"], env=_foreign(tmp_path), text=True,
                          capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    packages = json.loads(done.stdout)["packages"]
    assert packages["workers"]["location"].endswith("/workers") and "hides ours" in packages["workers"]["problem"]
    assert "PYTHONPATH" in packages["workers"]["hint"]
    assert packages["hal"]["problem"] is None and packages["runners"]["problem"] is None


@pytest.mark.slow
def test_generate_says_why_it_cannot_import_the_workers(tmp_path: Path) -> None:
    environment = _foreign(tmp_path)
    # An editable install finds the modules of our package that the foreign one lacks, so this one must be there.
    (tmp_path / "workers" / "executors").mkdir()
    (tmp_path / "workers" / "executors" / "driver.py").write_text("from workers import Pool\n")
    done = subprocess.run([sys.executable, "-m", "hal", "generate", "--device", "null", "1+1="], text=True,
                          env=environment, capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("hal: error: package 'workers' is another distribution's"), done.stderr


def test_overwritten_files_are_found_by_their_hash(tmp_path: Path) -> None:
    """An installed (not editable) distribution, one file of which another installer has overwritten."""
    info = tmp_path / f"{identity.DISTRIBUTION.replace('-', '_')}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {identity.DISTRIBUTION}\nVersion: 0\n")
    record = []
    for name in ("workers/__init__.py", "workers/a.py", "runners/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{path.stat().st_size}")
    (info / "RECORD").write_text("\n".join(record))
    found = next(iter(identity.Distribution.discover(path=[str(tmp_path)])))
    assert identity.changed_files(found) == {}
    (tmp_path / "workers" / "a.py").write_text("# theirs\n")
    (tmp_path / "workers" / "__init__.py").unlink()
    assert identity.changed_files(found) == {"workers": ["workers/__init__.py", "workers/a.py"]}
