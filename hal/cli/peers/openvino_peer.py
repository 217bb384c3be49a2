from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai
from gguf_file import KINDS, as_gguf


class Peer:
    def __init__(self, model: str, dtype: str, threads: int, length: int, batch: int, bits: str | None,
                 scratch: str) -> None:
        kind = KINDS[bits or "float16"]  # it reads no bfloat16 from a file, and computes in bfloat16 where the CPU can
        limits = openvino_genai.SchedulerConfig()
        limits.max_num_seqs, limits.max_num_batched_tokens, limits.enable_prefix_caching = batch, 2048, False
        limits.num_kv_blocks = 2 + batch * -(-length // 16)
        self.pipe = openvino_genai.ContinuousBatchingPipeline(as_gguf(model, kind, scratch), limits, "CPU", {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
        self.about = f"openvino-genai {openvino_genai.__version__}, {kind}, continuous batching, no prefix caching"

    def run(self, prompts: list[list[int]], new_tokens: int) -> list[tuple[float, int, int]]:
        wanted, events = openvino_genai.GenerationConfig(), []
        wanted.max_new_tokens, wanted.ignore_eos, wanted.do_sample = new_tokens, True, False
        start = time.perf_counter()
        handles = [self.pipe.add_request(i, openvino.Tensor(np.array([prompt], np.int64)), wanted)
                   for i, prompt in enumerate(prompts)]
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
            for i, handle in enumerate(handles):
                if handle.can_read():
                    gained = sum(len(output.generated_ids) for output in handle.read().values())
                    events.append((time.perf_counter() - start, i, gained))
        return events
