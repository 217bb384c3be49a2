"""What fewer bits cost in accuracy: `python benchmarks/quantization.py [--model DIR] [--device NAME] [--problems N]`.

The bundled model answers its held-out problems with each form of weights and of KV cache. The error is that of the
log-probabilities of all tokens of the problems and their right answers, against dense weights in fp32.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

FORMS: dict[str, dict[str, Any]] = {"dense": {}, **{n: {"quantize": n} for n in ("fp8", "int8", "int4")},
                                    "dense, KV cache fp8": {"kv_dtype": "fp8"}}


def measured(model: str, device: str, problems: list[dict[str, str]], options: dict[str, Any],
             ) -> tuple[int, torch.Tensor]:
    """Right answers, and the log-probability of each token of the problems with their answers but the first."""
    with LLM(model, device=device, **{"dtype": "float32", **options}) as llm:
        asked = llm.generate([p["prompt"] for p in problems], SamplingParams(max_tokens=8))
        right = sum(output.text.strip() == p["answer"] for output, p in zip(asked, problems, strict=True))
        whole = llm.generate([p["prompt"] + p["answer"] for p in problems],
                             SamplingParams(max_tokens=1, prompt_logprobs=0))
    found = [entry.logprob for output in whole for entry in output.prompt_logprobs or [] if entry is not None]
    return right, torch.tensor(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED_MODEL))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--problems", type=int, default=1000)
    args = parser.parse_args()
    lines = (BUNDLED_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines[:args.problems]]
    _, exact = measured(args.model, args.device, problems, {})
    print("| weights | right | mean error | largest error |\n| --- | --- | --- | --- |")
    for name, options in FORMS.items():
        right, logprobs = measured(args.model, args.device, problems, options)
        error = (logprobs - exact).abs()
        print(f"| {name} | {right} of {len(problems)} | {error.mean():.1e} | {error.max():.1e} |", flush=True)


if __name__ == "__main__":
    main()
