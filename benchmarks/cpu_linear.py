"""Linear layers of a 0.5B shape on the CPU: ms of each way to multiply by them, and GB/s of the weight's bytes.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/cpu_linear.py [--dtype float32]

HAL_CPU_KERNELS=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 show what a CPU without AVX-512 does.
"""

from __future__ import annotations

import argparse

import torch

from runners.cpu.choice import measure
from runners.cpu.linears import BUCKETS, Kernels

SHAPES = ((896, 1152), (896, 896), (896, 9728), (4864, 896), (896, 151936))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    dtype, kernels = getattr(torch, parser.parse_args().dtype), Kernels()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernels {kernels.name}, {dtype}")
    for inner, outer in SHAPES:
        found = measure(torch.randn(outer, inner).to(dtype), kernels)
        for way in found[BUCKETS[0]]:
            print(f"{inner:>5} x {outer:<7} {way:<11}" + " |".join(
                f"{rows:>5}: {times[way][0] * 1e3:7.3f} ms {times[way][1] / times[way][0] / 1e9:5.1f} GB/s"
                for rows, times in found.items()), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
