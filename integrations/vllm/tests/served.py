"""vLLM's LLM over hal's ranks, in this process, on the bundled model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch


@contextlib.contextmanager
def serving(device: str = "cpu", dialect: str = "V1", **options: Any) -> Iterator[Any]:
    """vLLM's LLM over hal's ranks. `dialect`: of the scheduler's output, V1 or V2."""
    from vllm import LLM
    from vllm.config import VllmConfig

    hal_options = {"device": device, **options.pop("hal", {})}
    # vLLM speaks the V2 dialect only where it finds Triton; hal needs none.
    patched = pytest.MonkeyPatch()
    patched.setattr("vllm.config.vllm.HAS_TRITON", True)
    patched.setattr(VllmConfig, "use_v2_model_runner", property(lambda self: dialect == "V2"))
    llm = LLM(**{"model": bundled(), "max_model_len": 96, "max_num_seqs": 8, "block_size": 16,
                 "num_gpu_blocks_override": 64, "dtype": "float32",
                 "additional_config": {"hal": hal_options}, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        patched.undo()


def bundled() -> str:
    from hal.config import BUNDLED_MODEL

    return str(BUNDLED_MODEL)


def tokens_of(outputs: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@cache
def reference_model(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bundled(), dtype=dtype)


def reference(tokens: list[int], dtype: torch.dtype = torch.float32, *, logprobs: bool = True) -> np.ndarray:
    """Logprobs, or scores, [len(tokens), vocabulary] of the next token at each place, by transformers."""
    with torch.inference_mode():
        logits = reference_model(dtype)(torch.tensor([tokens])).logits[0]
    found: np.ndarray = (logits.log_softmax(-1) if logprobs else logits).numpy()
    return found
