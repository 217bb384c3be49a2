"""What one layout generates. Run as a script, by torchrun, each rank writes that to a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

PROBLEMS = [json.loads(line) for line in (BUNDLED_MODEL / "heldout.jsonl").read_text().splitlines()][:300]
SAMPLED = 24


def generate(**options: Any) -> dict[str, Any]:
    """Greedy answers to additions as texts, how many are right, and seeded samples as token ids."""
    sampled = [SamplingParams(temperature=1.3, top_k=20 * (i % 2), seed=i, max_tokens=12, ignore_eos=True)
               for i in range(SAMPLED)]
    with LLM(dtype="float32", max_num_batched_tokens=100, **options) as llm:
        texts = [o.text for o in llm.generate([p["prompt"] for p in PROBLEMS])]
        prompts = [f"{'1234567890'[:1 + i % 9]}+" for i in range(SAMPLED)]
        tokens = [o.token_ids for o in llm.generate(prompts, sampled)]
    return {"texts": texts, "right": sum(t == p["answer"] for t, p in zip(texts, PROBLEMS, strict=True)),
            "tokens": tokens}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = generate(**json.loads(sys.argv[1]))
    (Path(sys.argv[2]) / os.environ["RANK"]).write_text(json.dumps(found))
