"""The compiled kernels (kernels.c), which the package's build makes if there is a compiler, and their call by ctypes.

Importing this loads no torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from pathlib import Path
from typing import Any

from hal.errors import ConfigError

LEVELS = ("off", "avx2", "avx512", "avx512_bf16")  # in the order of kernels.c
VARIABLE = "HAL_CPU_KERNELS"
ABI = 10
_FOLDER = Path(__file__).parent


class Weight(ctypes.Structure):
    """As kernels.c has it."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("w", "bias")),
                *((name, ctypes.c_int64) for name in ("inputs", "outputs", "row_bytes")),
                ("kind", ctypes.c_int32), ("level", ctypes.c_int32)]


class FewBits(ctypes.Structure):
    """As few_bits.c has it."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("values", "scales", "zeros", "bias")),
                *((name, ctypes.c_int64) for name in ("inputs", "padded", "outputs", "groups", "x_group", "x_groups",
                                                      "per_scale")),
                *((name, ctypes.c_int32) for name in ("bits", "scale_kind", "level"))]


class Decode(ctypes.Structure):
    """As kernels.h has it."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("q", "out", "keys", "values", "tables", "lens", "slots",
                                                       "cos", "sin")),
                *((name, ctypes.c_int64) for name in ("n", "heads", "kv_heads", "head_dim", "block_size",
                                                      "table_stride", "q_stride", "window")),
                ("scale", ctypes.c_float), ("kind", ctypes.c_int32), ("level", ctypes.c_int32)]


class Operation(ctypes.Structure):
    """As tape.c has it."""

    _fields_ = [*((name, ctypes.c_int32) for name in ("code", "bf16", "wide_weight", "parts")),
                *((name, ctypes.c_void_p) for name in ("x", "also", "weight", "y", "sum")),
                *((name, ctypes.c_int64) for name in ("width", "x_stride", "y_stride")),
                ("eps", ctypes.c_float), ("table_rows", ctypes.c_int32), ("decode", ctypes.c_void_p)]


class Step(ctypes.Structure):
    """As tape.c has it."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("ids", "positions", "lens", "slots", "tables")),
                ("n", ctypes.c_int64), ("table_stride", ctypes.c_int64)]


@functools.cache
def load() -> tuple[Any, str]:
    """The library or None, and the highest level that this processor has, or why there is no library."""
    found = next(iter(sorted(_FOLDER.glob("_kernels*.so"))), None)
    if found is None:
        return None, "not built: there was no compiler when the package was installed"
    try:
        library = ctypes.CDLL(str(found))
        if library.hal_abi() != ABI:
            return None, "built from an older source: install the package again"
        level = library.hal_level()
        if not level:
            return None, "this processor has no AVX2"
        _declare(library)
    except (OSError, AttributeError) as error:
        return None, f"the library does not load: {error}"
    return library, LEVELS[level]


def _declare(library: Any) -> None:
    unsigned, pointer, size = ctypes.c_uint, ctypes.c_void_p, ctypes.c_int64
    library.hal_linear.argtypes = library.hal_few_bits.argtypes = (pointer, pointer, size, pointer, size, unsigned)
    library.hal_blocks.argtypes = (pointer, pointer, size, pointer, size, ctypes.c_int, unsigned)
    library.hal_few_bits_ready_bytes.argtypes, library.hal_few_bits_ready_bytes.restype = (pointer,), size
    library.hal_few_bits_ready.argtypes = (pointer, pointer, pointer)
    library.hal_few_bits_range.argtypes = (pointer, pointer, size, pointer, size, size, size)
    library.hal_decode.argtypes = library.hal_prompt.argtypes = (pointer, unsigned)
    library.hal_threads.argtypes = (pointer, pointer)
    library.hal_tape.argtypes, library.hal_tape.restype = (pointer, size, size), pointer
    library.hal_tape_run.argtypes, library.hal_tape_run.restype = (pointer, pointer, size, unsigned), size
    library.hal_tape_free.argtypes, library.hal_tape_free.restype = (pointer,), None
    library.hal_greedy.argtypes, library.hal_greedy.restype = (pointer, size, ctypes.c_int), size


def available() -> tuple[str, ...]:
    """The levels that this processor has, if the kernels are built."""
    library, highest = load()
    return () if library is None else LEVELS[1:LEVELS.index(highest) + 1]


def level() -> str:
    """Of the kernels that run: the highest of the processor, or what HAL_CPU_KERNELS restricts it to.

    Raises:
        ConfigError: the variable names no level.
    """
    wanted = os.environ.get(VARIABLE) or LEVELS[-1]
    if wanted not in LEVELS:
        raise ConfigError(f"{VARIABLE} names no level of the CPU's kernels", got=wanted, expected=" or ".join(LEVELS))
    return LEVELS[min(LEVELS.index(wanted), len(available()))]


def choices_file() -> Path:
    """Where `choice` keeps its measurements: HAL_CPU_CHOICES, or hal/cpu-choices.json in the user's caches."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return Path(os.environ.get("HAL_CPU_CHOICES") or base / "hal" / "cpu-choices.json")


def processor() -> str:
    try:
        return next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def described() -> str:
    """One line for people."""
    library, found = load()
    return f"none ({found})" if library is None else level() if level() != "off" else f"off by {VARIABLE}"


@functools.cache
def threaded() -> Any:
    """The library, whose threads are those of the OpenMP runtime that torch has loaded; a second runtime's threads
    would compete with them for the cores. None where there is no library or no such runtime. torch must be imported."""
    library, _ = load()
    if library is None:
        return None
    for path in _runtimes():
        try:
            runtime = ctypes.CDLL(path)  # loaded already, so this takes a reference
            calls = [ctypes.cast(f, ctypes.c_void_p) for f in (runtime.GOMP_parallel, runtime.omp_get_num_threads)]
        except (OSError, AttributeError):
            continue
        library.hal_threads(*calls)
        return library
    return None


def _runtimes() -> list[str]:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$", maps, re.MULTILINE)))
