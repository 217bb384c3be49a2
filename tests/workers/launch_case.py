"""What one layout generates. torchrun runs this file as a script: each rank generates over one control plane after the
other, and writes the results to a folder."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

PROBLEMS = [json.loads(line) for line in (BUNDLED_MODEL / "heldout.jsonl").read_text().splitlines()][:100]
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


@functools.cache
def alone() -> dict[str, Any]:
    found = generate()
    assert found["right"] >= 0.99 * len(PROBLEMS)
    return found


def launch(world: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    import forked  # not where this file is a script

    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), str(script), *arguments]
    return forked.run([sys.executable, *command], capture_output=True, text=True, timeout=600, check=False)


def generated_by_launched(folder: Path, *planes: str, tp: int, pp: int) -> list[dict[str, dict[str, Any]]]:
    """What each rank that torchrun starts generates, by control plane. One launch serves all planes, since most of its
    time goes into starting Python and importing torch."""
    options = json.dumps({"wire": "none", "tp": tp, "pp": pp})
    done = launch(tp * pp, Path(__file__), options, str(folder), *planes)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(tp * pp)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {plane: generate(control_plane=plane, **json.loads(sys.argv[1])) for plane in sys.argv[3:]}
    (Path(sys.argv[2]) / os.environ["RANK"]).write_text(json.dumps(found))
