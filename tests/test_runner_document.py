"""The code of docs/runner.md runs, block after block, and prints what the text shows behind each block."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from textwrap import dedent

DOCUMENT = Path(__file__).parents[1] / "docs" / "runner.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```\n\n((?:    [^\n]*\n)+)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


def test_every_block_prints_what_is_shown() -> None:
    assert len(BLOCKS) == DOCUMENT.read_text().count("```python") == 3
    names: dict[str, object] = {"__name__": "runner_document"}
    for code, shown in BLOCKS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, str(DOCUMENT), "exec"), names)
        assert out.getvalue() == dedent(shown)
