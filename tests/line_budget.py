"""The library's size has two ceilings, in lines that hold code: one for the core and one for hal + runners + workers.

The core is what a maintainer must know to change anything: contracts, schema, guard, features, paged, engine and
workers. Its ceiling is the one that keeps ideas few. The rest are leaves (families of models, formats of weights,
kernels, commands, the conformance kit): each is read when it is needed and deleted without touching the others.

Blank lines, comments and docstrings are free, as in tinygrad, where the habit comes from: a ceiling must not make
anybody document less.
"""

from __future__ import annotations

import sys
import tokenize
from pathlib import Path

BUDGET = 30_625
CORE_BUDGET = 9_446
CORE = ("hal/contracts", "hal/schema", "hal/guard", "hal/features", "hal/paged", "hal/engine", "workers")
ROOT = Path(__file__).parents[1]
_FREE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
         tokenize.ENDMARKER}


def code_lines(path: Path) -> int:
    lines: set[int] = set()
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    before = tokenize.NEWLINE
    for token in tokens:
        docstring = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if token.type not in _FREE and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
            before = token.type
    return len(lines)


def main() -> int:
    sizes = {path: code_lines(path) for top in ("hal", "runners", "workers") for path in (ROOT / top).rglob("*.py")}
    total = sum(sizes.values())
    core = sum(size for path, size in sizes.items() if path.relative_to(ROOT).as_posix().startswith(CORE))
    print(f"line budget: {total} of {BUDGET} lines of code in {len(sizes)} files, {core} of {CORE_BUDGET} in the core")
    return int(total > BUDGET or core > CORE_BUDGET)


if __name__ == "__main__":
    sys.exit(main())
