"""The cases of the kit: plain functions that are registered, and the ways in which a case may end."""

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
_MODULES = ("backend", "inputs", "operations", "weights", "attention", "sampler", "model", "engine", "batch",
            "adapters", "embedding", "graphs", "distributed", "guard")
# The capabilities that a case may need, and whether a backend declares each.
NEEDS: dict[str, Callable[[Backend], bool]] = {
    "checkpoints": lambda b: b.capabilities.checkpoints, "swap": lambda b: b.capabilities.swap,
    "asynchronous": lambda b: b.capabilities.asynchronous, "tp": lambda b: b.capabilities.max_tp > 1,
    "pp": lambda b: b.capabilities.max_pp > 1, "adapters": lambda b: b.capabilities.adapters,
    "embeddings": lambda b: b.capabilities.embeddings,
    "batch_invariant": lambda b: b.capabilities.batch_invariant != "no"}


class Mismatch(AssertionError):
    """The backend's result is wrong."""


class NotApplicable(Exception):
    """The backend lacks the subject of the case, which the text names."""


@dataclass(frozen=True, slots=True)
class Case:
    """Attributes:
        name: such as "L2/attention/window". needs: keys of NEEDS. once: the case does not depend on the dtype, so it
            runs with the first one only. alone: a process of its own runs the case. doc: the property that it shows.
    """

    name: str
    level: int
    area: str
    check: Check
    needs: tuple[str, ...]
    once: bool
    doc: str
    alone: bool = False

    def missing(self, backend: Backend) -> str | None:
        """A sentence that names a capability which the case needs and the backend does not declare."""
        lacking = [need for need in self.needs if not NEEDS[need](backend)]
        return f"the backend does not declare: {', '.join(lacking)}" if lacking else None


CASES: dict[str, Case] = {}


def case(level: int, area: str, *needs: str, once: bool = False, alone: bool = False) -> Callable[[Check], Check]:
    """Register a function as the case "L<level>/<area>/<its name>". Its docstring says which property it shows."""
    def register(check: Check) -> Check:
        name = f"L{level}/{area}/{check.__name__}"
        if name in CASES or not set(needs) <= NEEDS.keys():
            raise ValueError(f"{name} is there already, or needs something unknown: {needs}")
        CASES[name] = Case(name, level, area, check, needs, once, (check.__doc__ or "").strip(), alone)
        return check
    return register


def all_cases() -> list[Case]:
    """Every case of the kit, by level."""
    for module in _MODULES:
        importlib.import_module(f"hal.conformance.cases.{module}")
    return sorted(CASES.values(), key=lambda c: c.level)
