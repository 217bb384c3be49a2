"""Decode speed of LLM.generate's engine beside transformers `generate` (SDPA, dynamic cache), one checkpoint of random
weights, same threads, interleaved in one process.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/cpu_vs_transformers.py [--quick]

A step's time is the mean between two tokens while the whole batch decodes; the table has medians of the repeats.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from hal.cli.measure import time_batch
from hal.cli.shapes import SHAPES
from hal.engine.llm import LLM

SHAPE, BATCHES, PROMPT = "qwen2-0.5b", (1, 8, 32), 128


def save(directory: Path) -> Any:
    """The checkpoint, and transformers' model of it in bfloat16."""
    (directory / "config.json").write_text(json.dumps(SHAPES[SHAPE]))
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa",
                                                          trust_remote_code=False)
    model.save_pretrained(directory)
    return model.eval()


class Clock(transformers.StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def theirs(model: Any, batch: int, new_tokens: int) -> float:
    """Seconds of a decode step."""
    draw, clock = random.Random(batch), Clock()
    ids = torch.tensor([[draw.randrange(model.config.vocab_size) for _ in range(PROMPT)] for _ in range(batch)])
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
                   min_new_tokens=new_tokens, pad_token_id=0, stopping_criteria=[clock])
    return (clock.times[-1] - clock.times[0]) / (new_tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="16 tokens, one repeat")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    new_tokens, repeats = (16, 1) if args.quick else (64, args.repeat)
    transformers.utils.logging.disable_progress_bar()
    steps: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = save(Path(scratch))
        with LLM(scratch, device="cpu", max_num_seqs=max(BATCHES), max_model_len=PROMPT + new_tokens,
                 num_blocks=1 + max(BATCHES) * -(-(PROMPT + new_tokens) // 16), prefix_caching=False) as llm:
            time_batch(llm, model.config.vocab_size, 1, PROMPT, 4)
            theirs(model, 1, 4)
            for _ in range(repeats):
                for batch in BATCHES:
                    ours = time_batch(llm, model.config.vocab_size, batch, PROMPT, new_tokens).decode_step
                    steps.setdefault(("hal", batch), []).append(ours)
                    steps.setdefault(("transformers", batch), []).append(theirs(model, batch, new_tokens))
    print(f"{SHAPE} shape, bfloat16, prompt {PROMPT}, {new_tokens} new tokens, {torch.get_num_threads()} thread(s), "
          f"torch {torch.__version__}, transformers {transformers.__version__}, medians of {repeats}\n")
    print("| batch | hal tok/s | transformers tok/s | ratio |\n|---|---|---|---|")
    for batch in BATCHES:
        ours, other = (batch / statistics.median(steps[name, batch]) for name in ("hal", "transformers"))
        print(f"| {batch} | {ours:.1f} | {other:.1f} | {ours / other:.2f} |")


if __name__ == "__main__":
    main()
