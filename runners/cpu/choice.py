"""The fastest way to multiply by a weight of some shape, measured on this machine when such a weight is first loaded.

The choices are kept in a file, so that a later start measures nothing. Without the file they are measured again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from runners.cpu.compiled import ABI, choices_file, processor
from runners.cpu.linears import BLOCKS, BUCKETS, PACKED, WAYS, DenseWeight, Kernels, can_pack, fits
from runners.cpu.memory import HugePages

_SMALL = 1 << 18  # values of a weight below which nothing is measured
_BYTES = 1 << 25  # of copies that take turns, so that few rows are multiplied by weights that come from memory
_COPIES = 64
_MANY_VALUES = 1 << 22  # of the weights that are measured with many rows
_LITTLE = 1 << 22  # bytes of a weight above which one thread wins only while others use the cores
_ROUNDS = 5
_GAIN = 1.03  # oneDNN's layout must gain so much: it is a second copy of a tied embedding
_DECODE = 3  # of BUCKETS that oneDNN's layout must gain over by themselves, since it keeps a decode step off the tape


def choose(weight: torch.Tensor, kernels: Kernels) -> tuple[str, ...]:
    """The way for each of BUCKETS for a dense weight [out, in]."""
    ways = _ways(weight, kernels)
    if weight.numel() < _SMALL:
        few = "kernel" if "kernel" in ways else "torch"
        # PyTorch's products in bfloat16 are slow on processors with AVX2 alone.
        many = BLOCKS if BLOCKS in ways and kernels.name == "avx2" else "torch"
        return (few,) * (len(BUCKETS) - 1) + (many,)
    return once(f"{str(weight.dtype)[6:]} {weight.shape[0]} x {weight.shape[1]}", kernels.name,
                lambda known: _valid(known, ways), lambda: _measured(weight, kernels))


def once(what: str, level: str, valid: Callable[[Any], bool], measure: Callable[[], tuple[str, ...]],
         ) -> tuple[str, ...]:
    """The result of `measure`, or what an earlier start on this machine has measured under the name `what`, where it is
    still `valid`."""
    machine = _machine(level)
    known = _read().get(machine, {}).get(what)
    if valid(known):
        return tuple(known)
    found = measure()
    _write(machine, what, found)
    return found


def _ways(weight: torch.Tensor, kernels: Kernels) -> list[str]:
    """To multiply by the weight where it lies."""
    without = {"fp32 tiles"} if weight.dtype == torch.float32 else set()
    if not kernels or not fits(weight):
        without |= {"kernel", "one thread", BLOCKS}
    if weight.dtype != torch.bfloat16:
        without.add(BLOCKS)
    if weight.numel() * weight.element_size() > _LITTLE:
        without.add("one thread")
    return [way for way in WAYS if way not in without]


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    return can_pack(dtype)


def _measured(weight: torch.Tensor, kernels: Kernels) -> tuple[str, ...]:
    best, gains = [], []
    for times in measure(weight, kernels).values():
        by_row = min((way for way in times if way != PACKED), key=lambda way: times[way][0])
        best.append(by_row)
        gains.append(math.log(times[by_row][0] / times[PACKED][0] / _GAIN) if PACKED in times else -1.0)
    if sum(gains) > 0 and sum(gains[:_DECODE]) > 0:
        return (PACKED,) * len(BUCKETS)
    return tuple(best)


@torch.inference_mode()
def measure(weight: torch.Tensor, kernels: Kernels) -> dict[int, dict[str, tuple[float, int]]]:
    """For each of BUCKETS and each way: seconds, and the bytes of weights that were read in them."""
    part = weight[:max(_BYTES // (weight.shape[1] * weight.element_size()), 64)]  # of a large weight, some outputs
    count = min(_BYTES // (part.numel() * part.element_size()), _COPIES)
    pages = HugePages()
    copies = [pages.copy(part) for _ in range(count)]
    names = [*_ways(weight, kernels), *([PACKED] if _packs(weight.dtype) else [])]
    layers = {name: [DenseWeight(each, None, kernels, (name,) * len(BUCKETS)) for each in copies] for name in names}
    found = {}
    for rows in BUCKETS:
        some = max(min(len(copies), _MANY_VALUES // part.numel()), 1) if rows > BUCKETS[-2] else len(copies)
        times = _times({name: each[:some] for name, each in layers.items()},
                       torch.randn(rows, weight.shape[1], dtype=weight.dtype))
        found[rows] = {name: (taken, some * part.numel() * part.element_size()) for name, taken in times.items()}
    return found


def _times(layers: Mapping[str, Sequence[DenseWeight]], x: torch.Tensor) -> dict[str, float]:
    """Seconds of each way, the least of some rounds in which they take turns."""
    found = {name: math.inf for name in layers}
    for turn in range(_ROUNDS):
        for name, copies in layers.items():
            if found[name] > 2 * min(found.values()) and turn > 1:
                continue
            start = time.perf_counter()
            for layer in copies:
                layer(x)
            if turn:  # the first round warms up
                found[name] = min(found[name], time.perf_counter() - start)
    return found


def _machine(level: str) -> str:
    """All that a measurement depends on beside the shape."""
    return ", ".join((processor(), f"kernels {level} {ABI}", f"{torch.get_num_threads()} threads",
                      f"torch {torch.__version__}", torch.backends.cpu.get_cpu_capability(),
                      os.environ.get("ONEDNN_MAX_CPU_ISA", "all")))


def _valid(known: Any, ways: Sequence[str]) -> bool:
    return isinstance(known, list) and len(known) == len(BUCKETS) and (
        all(way in ways for way in known) or set(known) == {PACKED})


def _read() -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(choices_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {m: s for m, s in found.items() if isinstance(s, dict)} if isinstance(found, dict) else {}


def _write(machine: str, shape: str, chosen: tuple[str, ...]) -> None:
    """Ranks write at the same time: each replaces the file whole. One may lose the choice of another, which is measured
    again then. A folder that cannot be written costs the measurement at every start."""
    file, found = choices_file(), _read()
    found.setdefault(machine, {})[shape] = list(chosen)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(found, out, indent=1)
        os.replace(name, file)
