"""hal compile: compile a device's programs ahead of time, into the folder where it keeps them"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hal.cli import options
from hal.errors import BackendError

EPILOG = """It loads the model and compiles what the first start of an engine with these options would compile. Later
starts with the same options on this machine then read the programs. Give the options that the engine will have: the
shapes follow from them. To move the programs to other machines, set the folder by the device's own variable, and copy
it.

example:
  hal compile --device NAME --model DIR --max-num-seqs 64 --max-model-len 4096"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    report = compile_ahead(options.engine_options(args))
    print(json.dumps(report, indent=2) if args.json else _shown(report))
    return 0


def compile_ahead(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Start an engine with these options and end it. The report: seconds, and of each folder its path, the files and
    bytes in it, and how many files are new.

    Raises:
        BackendError: the device keeps no programs. Those of LLM.
    """
    from hal.config import EngineConfig
    from hal.contracts import backend as backends
    from hal.engine.llm import LLM

    backend = backends.select(EngineConfig(**chosen).device)
    folders = backend.runtime.program_folders()
    if not folders:
        raise BackendError(f"device {backend.name!r} keeps no compiled programs between starts",
                           hint="nothing has to be compiled ahead, or the device compiles at each start")
    before, start = [_files(folder) for folder in folders.values()], time.perf_counter()
    with LLM(**chosen, progress=sys.stderr.isatty()):
        pass
    found = [_files(folder) for folder in folders.values()]
    return {"device": backend.name, "seconds": time.perf_counter() - start, "folders": [
        {"what": what, "path": str(path), "files": len(now), "bytes": sum(now.values()),
         "new_files": len(now.keys() - old.keys())}
        for (what, path), now, old in zip(folders.items(), found, before, strict=True)]}


def _files(folder: Path) -> dict[Path, int]:
    """The size of each file in a folder, which may be one that does not exist yet."""
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _shown(report: dict[str, Any]) -> str:
    lines = [f"{report['device']} started in {report['seconds']:.1f} s"]
    lines += [f"{f['what']}: {f['files']} files, {f['bytes'] / 1e6:.1f} MB, {f['new_files']} files new, in {f['path']}"
              for f in report["folders"]]
    return "\n".join(lines)
