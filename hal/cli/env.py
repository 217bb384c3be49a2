"""hal env: show backends, versions and what else a bug report needs"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hal.cli import identity
from hal.cpus import usable_cpus

EPILOG = """Exit code 1 when one of the packages hal, runners and workers is not ours (nothing will work then), or when
the device that --device names is not available."""
_LIBRARIES = ("torch", "numpy", "transformers", "tokenizers", "safetensors")
_NO_BACKENDS = "no backends: delete *.egg-info beside the packages if there is one, and run `pip install -e .`"
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HAL_STRICT", "HAL_CPU_KERNELS", "HAL_CPU_CHOICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", metavar="NAME", help="show this one too: module:attribute of a backend")


def run(args: argparse.Namespace) -> int:
    report = survey(args.device)
    text = json.dumps(report, indent=2) if args.json else render(report)
    print(text)
    missing = args.device is not None and not report["backends"][args.device]["available"]
    return int(missing or any(p["problem"] for p in report["packages"].values()))


def survey(device: str | None = None) -> dict[str, Any]:
    """The whole report, as JSON values. Paths below the home directory begin with ~. `device`: a backend to show beside
    the installed ones, as its name or module:attribute."""
    packages = {p.name: {k: v for k, v in asdict(p).items() if k != "name"} for p in identity.check_packages()}
    report = {"hal": _hal(), "packages": packages, "machine": _machine(), "libraries": _libraries(),
              "variables": {name: os.environ.get(name) for name in _VARIABLES}, "backends": _backends(device)}
    shown: dict[str, Any] = _without_home(report)
    return shown


def _hal() -> dict[str, Any]:
    from hal.contracts import VERSION

    found, root, kind = identity.installation()
    return {"version": found.version if found else None, "contracts": VERSION, "install": kind, "path": str(root)}


def _machine() -> dict[str, Any]:
    return {"python": platform.python_version(), "platform": platform.platform(), "processor": _processor(),
            "cpus": usable_cpus(), "memory_gib": _memory_gib()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _libraries() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _backends(device: str | None) -> dict[str, Any]:
    from hal.contracts.backend import survey as survey_backends

    found: dict[str, Any] = {}
    for name, (backend, reason) in survey_backends(*() if device is None else (device,)).items():
        found[name] = {"available": reason is None, "reason": reason}
        if backend is not None:
            try:
                capabilities = asdict(backend.capabilities)
                found[name] |= {"priority": backend.priority, "versions": dict(backend.versions()),
                                "dtypes": list(capabilities.pop("dtypes")), **capabilities}
            except Exception as error:  # a vendor's code raised, which may be the reason for the report
                found[name] = {"available": False, "reason": f"{type(error).__name__}: {error}"}
    return found


def _without_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    home = os.path.expanduser("~")  # Path.home() raises for a user that the system does not know
    return value.replace(home, "~") if isinstance(value, str) and len(home) > 1 else value


def render(report: dict[str, Any]) -> str:
    hal, machine = report["hal"], report["machine"]
    version = hal["version"] or "(not installed)"
    lines = [f"hal {version}, contracts {hal['contracts']}, {hal['install']}, in {hal['path']}"]
    for name, package in report["packages"].items():
        lines.append(f"  {name:<8} {'ok' if not package['problem'] else 'WRONG: ' + package['problem']}")
        if package["problem"]:
            lines += [f"    got: {package['location']}", f"    expected: {package['expected']}",
                      f"    to do: {package['hint']}"]
    lines += [f"python {machine['python']} on {machine['platform']}",
              f"{machine['processor']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB",
              ", ".join(f"{name} {found or 'missing'}" for name, found in report["libraries"].items()),
              ", ".join(f"{name}={value if value is not None else '(unset)'}"
                        for name, value in report["variables"].items()),
              "backends" if report["backends"] else _NO_BACKENDS]
    for name, backend in report["backends"].items():
        if not backend["available"]:
            lines.append(f"  {name:<8} rejected: {backend['reason']}")
            continue
        parts = [f"{what} {found}" for what, found in backend["versions"].items()]
        parts += [" ".join(backend["dtypes"]), f"tp up to {backend['max_tp']}", f"pp up to {backend['max_pp']}"]
        lines.append(f"  {name:<8} {', '.join(parts)}")
    return "\n".join(lines)
