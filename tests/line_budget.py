"""The library's size has a ceiling: lines of hal + runners + workers that hold code.

Blank lines, comments and docstrings are free, as in tinygrad, where the habit comes from: a ceiling must not make
anybody document less.
"""

from __future__ import annotations

import sys
import tokenize
from pathlib import Path

BUDGET = 20_000
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
    print(f"line budget: {total} of {BUDGET} lines of code in {len(sizes)} files")
    return int(total > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
