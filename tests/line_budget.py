"""The library's size has a ceiling: hal + runners + workers, blank lines and comments included."""

from __future__ import annotations

import sys
from pathlib import Path

BUDGET = 12_000
ROOT = Path(__file__).parents[1]


def main() -> int:
    files = (p for top in ("hal", "runners", "workers") for p in (ROOT / top).rglob("*.py"))
    sizes = {p: len(p.read_text().splitlines()) for p in files}
    total = sum(sizes.values())
    print(f"line budget: {total} of {BUDGET} in {len(sizes)} files")
    return int(total > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
