"""A check that Python finds the packages hal, runners and workers of this distribution.

`runners` and `workers` are common names. Another distribution that installs packages of these names overwrites ours
without a message, or hides ours when it comes first on sys.path.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

DISTRIBUTION = "hal-runtime"
PACKAGES = ("hal", "runners", "workers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """Attributes:
        location, expected: the directory that the package is imported from, and the one that it should come from.
        problem: what is wrong with the package, or None. hint: what the user can do about it.
    """

    name: str
    location: str | None
    expected: str
    problem: str | None = None
    hint: str | None = None


def installation() -> tuple[Distribution | None, Path, str]:
    """The distribution, the directory that holds its packages, and how it is installed: "installed", "editable" or
    "source tree" (not installed at all)."""
    # A build leaves metadata without a RECORD in the source tree. They come first when that is the working directory.
    found = next((d for d in Distribution.discover(name=DISTRIBUTION) if d.read_text("RECORD") is not None), None)
    if found is None:
        return None, Path(__file__).resolve().parents[2], "source tree"
    direct = json.loads(found.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        return found, Path(url2pathname(unquote(urlparse(direct["url"]).path))).resolve(), "editable"
    return found, Path(str(found.locate_file(""))).resolve(), "installed"


def check_packages() -> list[Package]:
    """The state of each of the three packages, without importing them."""
    found, root, kind = installation()
    changed = changed_files(found) if found and kind == "installed" else {}
    return [_check(name, root / name, changed.get(name, [])) for name in PACKAGES]


def _check(name: str, expected: Path, changed: list[str]) -> Package:
    location = _location(name)
    if location is None:
        return Package(name=name, location=None, expected=str(expected), problem=f"package {name!r} is not found",
                       hint=_reinstall([]))
    if location.resolve() != expected:
        return Package(name=name, location=str(location), expected=str(expected), hint=_reinstall(_owners(name)),
                       problem=f"package {name!r} is another distribution's, and hides ours")
    if changed:
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        return Package(name=name, location=str(location), expected=str(expected), hint=_reinstall(_owners(name)),
                       problem=f"files of package {name!r} are not those that {DISTRIBUTION} installed: {shown}")
    return Package(name=name, location=str(location), expected=str(expected))


def _location(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if places:
        return Path(places[0])
    return Path(spec.origin) if spec and spec.origin else None


def changed_files(found: Distribution) -> dict[str, list[str]]:
    """By package, the files whose content is not the installed one: they were overwritten, or edited."""
    changed: dict[str, list[str]] = {}
    for file in found.files or ():
        if file.hash is None or file.parts[0] not in PACKAGES:
            continue
        try:
            digest = hashlib.new(file.hash.mode, Path(str(file.locate())).read_bytes()).digest()
        except OSError:
            digest = b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            changed.setdefault(file.parts[0], []).append(str(file))
    return changed


def _owners(name: str) -> list[str]:
    """Other installed distributions that bring a top-level package of this name."""
    return sorted({d for d in packages_distributions().get(name, []) if d != DISTRIBUTION})


def _reinstall(owners: list[str]) -> str:
    if owners:
        return (f"{', '.join(owners)} installs it too: keep them in separate environments, or uninstall that one and "
                f"then run `pip install --force-reinstall --no-deps {DISTRIBUTION}`")
    return (f"take the directory off PYTHONPATH (or run elsewhere), or reinstall {DISTRIBUTION} in a fresh virtual "
            "environment")
