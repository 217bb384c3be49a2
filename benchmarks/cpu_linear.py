"""Linear layers of a 0.5B shape on the CPU: F.linear beside weights packed for oneDNN, as runners.cpu packs them.

    OMP_NUM_THREADS=1 python benchmarks/cpu_linear.py
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from hal.config import Topology
from hal.contracts.communicator import LocalCommunicator
from hal.models.layers import Build, column
from hal.weights import Projection
from runners.cpu.ops import CpuOps

SHAPES = ((896, 1152), (896, 896), (896, 9728), (4864, 896), (896, 151936))


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; median ms of F.linear / packed = ratio")
    for dtype in (torch.bfloat16, torch.float32):
        ops = CpuOps(dtype)
        assert ops.packs, "this PyTorch cannot pack"
        build = Build(Topology(), LocalCommunicator(), ops, dtype, torch.device("cpu"))
        for inner, outer in SHAPES:
            weight = torch.randn(outer, inner).to(dtype)
            layer, shown = column(build, inner, [Projection("x", outer)], bias=False), []
            layer.weight.data.copy_(weight)
            ops.pack_linear(layer)
            for rows in (1, 8, 32, 128):
                x = torch.randn(rows, inner).to(dtype)
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(9 if outer > 100_000 else 25):
                    start = time.perf_counter()
                    F.linear(x, weight)
                    middle = time.perf_counter()
                    ops.linear(x, layer)
                    times[0].append(middle - start)
                    times[1].append(time.perf_counter() - middle)
                plain, fast = (statistics.median(t[2:]) * 1e3 for t in times)
                shown.append(f"{plain:8.3f} /{fast:8.3f} ={plain / fast:5.2f}")
            print(f"{str(dtype)[6:]:>9} {inner:>5} x {outer:<7}", " |".join(shown), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
