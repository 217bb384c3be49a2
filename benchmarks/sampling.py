"""Sampling a step's tokens: the CUDA sampler beside the default one, median microseconds by CUDA events.

    python benchmarks/sampling.py

`eager` has the launches in it, which the host may be slower to make than the device to run; `device` is the same in a
graph (the default sampler reads the device, and cannot be captured).
"""

from __future__ import annotations

import torch
from gpu import graphed, milliseconds

from hal.contracts.inputs import PagedModelInput
from hal.sampling.sampler import Sampler
from runners.cuda.sampler import CudaSampler

VOCAB = 128_256
FILTERS = {"top_k": (50, torch.int32), "top_p": (0.9, torch.float32), "min_p": (0.05, torch.float32)}
CASES: dict[str, tuple[str, ...] | None] = {"greedy": None, "temperature": (), "top-k 50": ("top_k",),
                                            "top-p 0.9": ("top_p",), "all": tuple(FILTERS)}


def step(n: int, filters: tuple[str, ...] | None) -> PagedModelInput:
    """n sequences that sample after their only token, on the device."""
    ids, fields = torch.arange(n, dtype=torch.int32), {}
    if filters is not None:
        fields = {"temperature": torch.full((n,), 0.8), "seeds": torch.arange(n)}
        fields |= {name: torch.full((n,), FILTERS[name][0], dtype=FILTERS[name][1]) for name in filters}
    m = PagedModelInput(input_ids=ids, positions=ids * 0, slot_mapping=(ids + 1) * 16, seq_lens=ids * 0 + 1,
                        query_start_loc=torch.arange(n + 1, dtype=torch.int32), block_tables=ids[:, None] + 1,
                        logits_indices=ids, block_size=16, num_decode_seqs=n, num_samples=n, **fields)
    return PagedModelInput.from_buffer(m.to_buffer(), torch.device("cuda"))


@torch.inference_mode()
def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, vocabulary {VOCAB}, bfloat16; us")
    print(f"{'logits':<8}{'case':<13}{'n':>5}{'default':>10}{'eager':>10}{'device':>10}{'ratio':>8}")
    for kind, scale in (("peaked", 3.0), ("flat", 0.5)):  # whose nuclei fit into the lanes, and not
        for name, filters in CASES.items():
            for n in (1, 32, 128):
                logits = (torch.randn(n, VOCAB, device="cuda") * scale).bfloat16()
                if kind == "peaked":  # as language models have them
                    logits[:, :200] += torch.linspace(12, 0, 200, device="cuda")
                m, ours, default = step(n, filters), CudaSampler(), Sampler()
                times = [f(lambda: call(logits, m)) * 1e3  # noqa: B023
                         for f, call in ((milliseconds, default), (milliseconds, ours), (graphed, ours))]
                print(f"{kind:<8}{name:<13}{n:>5}" + "".join(f"{t:>10.1f}" for t in times)
                      + f"{times[0] / times[1]:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
