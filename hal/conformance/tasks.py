"""Accuracy of whole answers, by dtype, format of the weights and topology. It is recorded, and no part of the verdict:
a model may be wrong, and a backend right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hal.config import BUNDLED_MODEL
from hal.contracts.backend import Backend
from hal.engine.llm import LLM
from hal.errors import ConfigError, HalError
from hal.sampling.params import SamplingParams

HELD_OUT = BUNDLED_MODEL / "heldout.jsonl"


@dataclass(frozen=True, slots=True)
class Problem:
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`how`: what was set beside the dtype, such as "quantize=int8". `refused`: why nothing ran, empty if it ran."""

    how: str
    dtype: str
    right: int
    total: int
    refused: str = ""

    @property
    def text(self) -> str:
        return f"{self.dtype}, {self.how}: " + (self.refused or f"{self.right} of {self.total} right")


def read_problems(path: str) -> list[Problem]:
    """JSONL with a prompt and an answer in each line. Raises ConfigError: the file cannot be read, or has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        found = [Problem(**json.loads(line)) for line in lines if line.strip()]
        if not found or not all(isinstance(text, str) and text for p in found for text in (p.prompt, p.answer)):
            raise TypeError("a prompt or an answer is missing, empty or no text")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError("the file of tasks cannot be used", got=f"{path}: {error}",
                          expected='lines such as {"prompt": "3+7=", "answer": "10"}') from None


def measure(device: str, backend: Backend, dtypes: tuple[str, ...], problems: list[Problem],
            model: str = str(BUNDLED_MODEL)) -> Iterator[Accuracy]:
    """Greedy answers, stripped of spaces, that equal the given ones: with the checkpoint's weights on one rank and on
    two, with fewer bits, and with a KV cache of fp8."""
    can = backend.capabilities
    ways: list[dict[str, Any]] = [{}, *({"quantize": kind} for kind in ("fp8", "int8", "int4"))]
    ways += [{"kv_dtype": "fp8"}] * can.fp8_kv + [{"tp": 2}] * (can.max_tp > 1) + [{"pp": 2}] * (can.max_pp > 1)
    params = [SamplingParams(max_tokens=2 * len(p.answer) + 8) for p in problems]
    for dtype in dtypes if can.checkpoints else ():
        for way in ways:
            how = ", ".join(f"{name}={value}" for name, value in way.items()) or "as stored, one rank"
            try:
                with LLM(model, device=device, dtype=dtype, **way) as llm:
                    outputs = llm.generate([p.prompt for p in problems], params)
            except HalError as error:
                yield Accuracy(how, dtype, 0, 0, f"refused: {str(error).splitlines()[0]}")
                continue
            right = sum(o.text.strip() == p.answer.strip() for o, p in zip(outputs, problems, strict=True))
            yield Accuracy(how, dtype, right, len(problems))
