"""What the layout promises: no device's name where every device is served, and no import circle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVICES = re.compile("cuda|nccl", re.IGNORECASE)
# Examples in the documentation of options.
EXAMPLES = {"hal/cli/record.py": "hal replay run.safetensors --device cuda",
            "hal/cli/bisect.py": "hal bisect run.safetensors --device cuda --against cpu"}


def test_workers_and_hal_name_no_device() -> None:
    """A backend supplies process groups, streams and events; hal.testing stands for devices that exist."""
    found = []
    for path in (*ROOT.glob("workers/**/*.py"), *ROOT.glob("hal/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not name.startswith("hal/testing/") and DEVICES.search(line.replace(EXAMPLES.get(name, "\n"), "")):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ["hal", "workers", "runners"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    """At module level; what only a type checker imports does not count."""
    grimp = pytest.importorskip("grimp", reason="needs the extra `lint`")
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    at_module_level: dict[str, set[str]] = {}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            details = graph.get_import_details(importer=module, imported=imported)
            if any(_at_module_level(module, line["line_number"]) for line in details):
                at_module_level.setdefault(module, set()).add(imported)
    assert len(graph.modules) > 5 and at_module_level
    assert not circles(at_module_level)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each module that closes one, found depth first."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module):], module])
        elif module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def _at_module_level(module: str, number: int) -> bool:
    """Whether the import on a line runs when the module is imported: it is not indented."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return not source.read_text().splitlines()[number - 1].startswith((" ", "\t"))
