from __future__ import annotations

import time
from typing import Any

import torch
import transformers


class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Notes when each token is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Peer:
    def __init__(self, model: str, dtype: str, threads: int, length: int, batch: int, bits: str | None,
                 scratch: str) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa", trust_remote_code=False).eval()
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}, generate, SDPA, {dtype}"

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int) -> list[tuple[float, int, int]]:
        clock, ids = Clock(), torch.tensor(prompts)
        start = time.perf_counter()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
                            min_new_tokens=new_tokens, pad_token_id=0, stopping_criteria=[clock])
        return [(at - start, i, 1) for at in clock.times for i in range(len(prompts))]
