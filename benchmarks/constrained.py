"""What token masks cost: decode steps of a batch that follows a JSON schema, and of the same batch without one.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/constrained.py [--shape qwen2-0.5b] [--batch 32]

Both batches take turns in one process; the table has medians of their steps. Weights are random. The vocabulary is made
of the words and word pieces of Python's library, as many as the shape has tokens, since a mask costs by vocabulary.
`masks` is the time in which the host computes them, a part of the step above it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import hal.engine.core as engine
from hal import LLM, SamplingParams
from hal.cli.shapes import SHAPES
from hal.constrained.constraint import Constraints

SCHEMA = {"type": "array", "minItems": 999, "items": {
    "type": "object", "required": ["name", "age", "kind", "tags"], "additionalProperties": False, "properties": {
        "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["person", "place", "thing"]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1}}}}


class Table(dict[int, bytes]):
    """A made-up vocabulary. Token 0 ends a sequence."""

    hidden = {"<eos>": 0}

    def plain(self, text: str) -> list[int]:
        raise NotImplementedError

    def __init__(self, size: int) -> None:
        found: Counter[str] = Counter()
        for path in sorted(Path(os.__file__).parent.glob("**/*.py"))[:1500]:
            words = re.findall(r" ?\w+|\s+|[^\w\s]+", path.read_text(errors="replace"))
            found.update(words)
            found.update(word[:n] for word in words for n in (2, 3, 4, 5))
        names = [bytes([i]) for i in range(256)] + [word.encode() for word, _ in found.most_common()]
        self.update(enumerate([b"", *list(dict.fromkeys(names))[:size - 1]]))
        self.size = len(self)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**SHAPES[args.shape], "eos_token_id": 0}))
        llm = LLM(folder, device=args.device, random_weights=True, max_num_seqs=args.batch, max_model_len=512,
                  num_blocks=args.batch * 8)
    table = Table(llm.model_config.vocab_size)
    llm.inputs.constraints = Constraints(llm.model_config.vocab_size, [0], table)
    began = time.perf_counter()
    llm.check([1], SamplingParams(json_schema=SCHEMA))
    print(f"{args.shape} on {args.device}, batch {args.batch}, {table.size} tokens in the vocabulary; the first "
          f"grammar took {time.perf_counter() - began:.1f} s")
    computed, spent = engine.masks, list[float]()

    def timed(*given: object) -> object:
        start = time.perf_counter()
        found = computed(*given)  # type: ignore[arg-type]
        spent.append(time.perf_counter() - start)
        return found

    engine.masks = timed  # type: ignore[assignment]
    steps: dict[str, list[float]] = {"free": [], "schema": []}
    for turn in range(args.rounds + 1):  # the first is a warm-up
        for name, times in steps.items():
            for i in range(args.batch):
                llm.add_request([1 + i] * 16, SamplingParams(
                    max_tokens=args.tokens, temperature=1.0, seed=i + 100 * turn,
                    **({"ignore_eos": True} if name == "free" else {"json_schema": SCHEMA})))
            last = 0.0
            while llm.unfinished:
                llm.step(text=False)
                now = time.perf_counter()
                if turn and llm.stats().waiting == 0 and last:
                    times.append(now - last)
                last = now
            if not turn:
                spent.clear()
    free, schema = (statistics.median(times) * 1e3 for times in steps.values())
    masks = statistics.median(spent) * 1e3
    print(f"free   {free:8.2f} ms a step\nschema {schema:8.2f} ms a step ({schema / free - 1:+.1%})\n"
          f"masks  {masks:8.2f} ms of it, {masks / args.batch * 1e3:.0f} us a token ({masks / free:.1%})")
    llm.shutdown()


if __name__ == "__main__":
    main()
