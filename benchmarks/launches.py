"""Where a decode step of one sequence goes when its kernels are small, each kind in a chain inside one graph:
`python benchmarks/launches.py`. Not a bar: for whoever tunes the kernels; `hal bench --profile` shows whole steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from gpu import graphed

from runners.cuda.kernels import attention, gemv
from runners.cuda.kernels.gemv import Norm, Tile

LAYERS = 24
KIND = {"dtype": torch.bfloat16, "device": "cuda"}


def chained(name: str, call: Callable[[int], object]) -> None:
    """`call(i)` is layer i's, of whose weights or cache few are in the device's cache when it runs again."""
    ms = graphed(lambda: [call(i) for i in range(LAYERS)])
    print(f"{name:<60} {ms / LAYERS * 1e3:7.2f} us", flush=True)


@torch.inference_mode()
def kernels() -> None:
    hidden, ffn, heads, kv, dim = 896, 4864, 14, 2, 64
    weights = {n: torch.randn(LAYERS, *shape, **KIND).div_(30) for n, shape in
               {"qkv": ((heads + 2 * kv) * dim, hidden), "out": (hidden, hidden), "up": (2 * ffn, hidden),
                "down": (hidden, ffn)}.items()}
    x, norm, wide = torch.randn(1, hidden, **KIND), torch.ones(hidden, **KIND), torch.randn(1, ffn, **KIND)
    for rows, columns, warps in ((8, 1024, 8), (8, 1024, 4), (4, 1024, 4), (4, 1024, 8), (2, 1024, 2), (2, 1024, 4),
                                 (1, 1024, 1), (16, 1024, 8)):
        tile = Tile(rows, columns, warps)
        for name, gated, normed in (("qkv", False, True), ("out", False, False), ("up", True, True)):
            given = Norm(norm, 1e-5, x) if normed else None
            chained(f"gemv {name} {tuple(tile)}",
                    lambda i: gemv.gemv(x, weights[name][i], None, tile, gated=gated, norm=given))  # noqa: B023
    for tile in (Tile(1, 4096, 4), Tile(1, 8192, 8), Tile(1, 2048, 4), Tile(2, 2048, 8), Tile(1, 1024, 1)):
        chained(f"gemv down {tuple(tile)}", lambda i: gemv.gemv(wide, weights["down"][i], None, tile))  # noqa: B023
    blocks = 15
    caches = torch.randn(LAYERS, 2, blocks + 1, kv, 16, dim, **KIND)
    tables = torch.arange(1, blocks + 1, dtype=torch.int32, device="cuda")[None]
    lens, slots = (torch.tensor([n], dtype=torch.int32, device="cuda") for n in (200, 13 * 16 + 7))
    qkv, table = torch.randn(1, heads + 2 * kv, dim, **KIND), torch.randn(300, dim, device="cuda")
    out = torch.empty(1, heads, dim, **KIND)
    new = attention.New(qkv[:, -2 * kv:-kv], qkv[:, -kv:], slots, (lens - 1, table))
    for how in itertools.starmap(attention.Division, itertools.product((1, 2, 4, 7), (32, 64, 128), (False, True))):
        chained(f"decode {how}", lambda i: attention.decode(qkv[:, :heads], caches[i], tables, lens, out, scale=0.1,
                                                            window=None, how=how, new=new))  # noqa: B023


if __name__ == "__main__":
    kernels()
