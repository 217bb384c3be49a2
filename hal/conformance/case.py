"""What the kit is made of: cases, registered as plain functions, and how one may end."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hal.conformance.context import Context
    from hal.contracts.backend import Backend

Status = Literal["pass", "fail", "xfail", "n/a", "error"]
Check = Callable[["Context"], None]
LEVELS = ("registration and capabilities", "input contracts", "operations", "a model", "graphs and buckets",
          "distributed", "replay and guard")
_MODULES = ("backend", "inputs", "operations", "attention", "sampler", "model", "engine", "graphs", "distributed",
            "guard")
# What a case may need: the capability, and whether a backend declares it.
NEEDS: dict[str, Callable[[Backend], bool]] = {
    "checkpoints": lambda b: b.capabilities.checkpoints, "swap": lambda b: b.capabilities.swap,
    "asynchronous": lambda b: b.capabilities.asynchronous, "tp": lambda b: b.capabilities.max_tp > 1,
    "pp": lambda b: b.capabilities.max_pp > 1}


class Mismatch(AssertionError):
    """The backend's result is wrong."""


class NotApplicable(Exception):
    """The backend lacks what the case is about; the text says what."""


@dataclass(frozen=True, slots=True)
class Case:
    """Attributes:
        name: "L2/attention/window". needs: keys of NEEDS. once: nothing in it depends on the dtype, so it runs with the
            first one alone. doc: what it shows.
    """

    name: str
    level: int
    area: str
    check: Check
    needs: tuple[str, ...]
    once: bool
    doc: str

    def missing(self, backend: Backend) -> str | None:
        """The capability that it needs and the backend does not declare, as a sentence."""
        lacking = [need for need in self.needs if not NEEDS[need](backend)]
        return f"the backend does not declare: {', '.join(lacking)}" if lacking else None


CASES: dict[str, Case] = {}


def case(level: int, area: str, *needs: str, once: bool = False) -> Callable[[Check], Check]:
    """Register a function as the case "L<level>/<area>/<its name>"; its docstring says what it shows."""
    def register(check: Check) -> Check:
        name = f"L{level}/{area}/{check.__name__}"
        if name in CASES or not set(needs) <= NEEDS.keys():
            raise ValueError(f"{name} is there already, or needs something unknown: {needs}")
        CASES[name] = Case(name, level, area, check, needs, once, (check.__doc__ or "").strip())
        return check
    return register


def all_cases() -> list[Case]:
    """Every case of the kit, by level."""
    for module in _MODULES:
        importlib.import_module(f"hal.conformance.cases.{module}")
    return sorted(CASES.values(), key=lambda c: c.level)
