"""hal certify: compare the Transformers backend with transformers' own forward pass, architecture by architecture"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

from hal.cli import options
from hal.errors import ConfigError

EPILOG = """examples:
  hal certify stablelm starcoder2          two architectures, with the default options of their configurations
  hal certify path/to/checkpoint           the architecture and the options of a config.json; no weights are read
  hal certify --all --tp 2 --pp 2 --table hal/assets/certificates.json --docs docs/architectures.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", metavar="TYPE|DIR", help="a model_type of transformers, or a checkpoint")
    parser.add_argument("--all", action="store_true", help="every causal language model of the installed transformers")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="(default: cpu)")
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1, help="2: also with two tensor-parallel ranks")
    parser.add_argument("--pp", type=int, choices=(1, 2), default=1, help="2: also with two pipeline stages")
    parser.add_argument("--limit", type=options.positive, default=120, metavar="S",
                        help="seconds for one architecture, which a process of its own then gives up (default: 120)")
    parser.add_argument("--table", type=options.path, metavar="FILE", help="add the rows to this table of certificates")
    parser.add_argument("--docs", type=options.path, metavar="FILE", help="write the table as Markdown")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not args.what and not args.all and not args.docs:
        args.usage_error("give a TYPE, a DIR or --all")
    what = _every_type() if args.all else args.what
    topologies = [name for name, size in (("tp2", args.tp), ("pp2", args.pp)) if size == 2]
    rows = []
    for row in _rows(what, args.device, topologies, args.limit):
        print(json.dumps(row), flush=True)
        rows.append(row)
        if args.table:
            _add(Path(args.table), row, args.device)
    if args.docs:
        from hal.engine.certificates import markdown

        table = json.loads(Path(args.table).read_text(encoding="utf-8")) if args.table else None
        Path(args.docs).write_text(markdown(table), encoding="utf-8")
    return int(not args.all and not all(row["admitted"] for row in rows))


def _every_type() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _rows(what: list[str], device: str, topologies: list[str], limit: int) -> Any:
    """One row for each. A process serves until an architecture exceeds its time; then another takes over."""
    context = multiprocessing.get_context("spawn")
    worker = pipe = None
    for name in what:
        if worker is None or not worker.is_alive():
            pipe, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs,))
            worker.start()
            theirs.close()
        assert pipe is not None
        pipe.send((name, device, topologies))
        try:
            if not pipe.poll(limit):
                raise TimeoutError(f"not done in {limit} s")
            row = pipe.recv()
        except (TimeoutError, EOFError, OSError) as error:
            worker.kill()
            worker.join()
            worker = None
            row = {"type": name, "architecture": "", "admitted": False, "error": None, "control": None,
                   "reason": str(error) or "the process died", "tp2": "not tried", "pp2": "not tried", "options": {},
                   "seconds": limit}
        yield row
    if pipe is not None and worker is not None:
        pipe.send(None)
        worker.join()


def _serve(pipe: Any) -> None:
    from hal.checkpoints.stored import read_json
    from hal.engine.certify import Certificate, certify
    from hal.errors import HalError

    while (task := pipe.recv()) is not None:
        name, device, topologies = task
        try:
            source = read_json(Path(name) / "config.json") if os.path.isdir(name) else None
            made = certify(name if source is None else str(source.get("model_type")), source, device=device,
                           topologies=topologies)
        except HalError as error:
            made = Certificate(name, reason=str(error).split("\n")[0])
        pipe.send(made.row())


def _add(path: Path, row: dict[str, Any], device: str) -> None:
    """Rows of the CPU decide about admission at load. Those of another device stand beside them."""
    import transformers

    table: dict[str, Any] = {"transformers": transformers.__version__, "devices": {}, "types": {}}
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["transformers"] != transformers.__version__:
            raise ConfigError("the table was made with another release of transformers", got=old["transformers"],
                              expected=transformers.__version__, hint="begin another file, with --all")
        table |= old
    kept = {name: value for name, value in row.items() if name not in ("type", "seconds")}
    rows = table["types"] if device == "cpu" else table["devices"].setdefault(device, {})
    rows[row["type"]] = kept if device == "cpu" else {name: kept[name] for name in (
        "architecture", "admitted", "reason", "error", "control")}
    types, devices = (",\n".join(f" {json.dumps(k)}: {json.dumps(dict(sorted(v.items())) if part == 'devices' else v)}"
                                 for k, v in sorted(table[part].items())) for part in ("types", "devices"))
    path.write_text(f'{{"transformers": {json.dumps(table["transformers"])}, "devices": {{\n{devices}\n}}, "types": '
                    f"{{\n{types}\n}}}}\n", encoding="utf-8")
