"""Phases of a step, and a guard that refuses communication where a phase forbids it. See docs/guard.md.

Importing this loads no torch; install() does.
"""

from __future__ import annotations

import os
import threading
from typing import Literal

from hal.guard.patch import Patches
from hal.guard.state import Phase, Region, allow, check, current, data_plane, leave_all, phase

__all__ = [
    "Phase", "Region", "allow", "check", "current", "data_plane", "install", "installed_tier", "leave_all",
    "phase", "uninstall",
]  # fmt: skip

Tier = Literal["always", "strict"]

_lock = threading.RLock()
_patches = Patches()
_tier: Tier | None = None


def install(strict: bool | None = None) -> None:
    """Make the guard effective in this process. Calling it again does nothing, or upgrades to the strict tier.

    Args:
        strict: also the strict tier (sockets, pipes, compiled collectives, threads, ...); None reads HAL_STRICT=1.
    """
    global _tier
    from hal.guard.always import patch_torch
    from hal.guard.logs import patch_logging

    if strict is None:
        strict = os.environ.get("HAL_STRICT") == "1"
    with _lock:
        try:
            if _tier is None:
                patch_torch(_patches)
                patch_logging(_patches)
                _tier = "always"
            if strict and _tier == "always":
                from hal.guard.strict import patch_strict

                patch_strict(_patches)
                _tier = "strict"
        except BaseException:
            uninstall()
            raise


def uninstall() -> None:
    """Restore every original function (for tests). Phases are still tracked."""
    global _tier
    with _lock:
        _patches.restore()
        _tier = None


def installed_tier() -> Tier | None:
    """The tier in effect in this process, or None."""
    return _tier
