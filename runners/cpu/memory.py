"""The memory that this process may still allocate: of the machine, and of the control groups that it is in. And memory
for weights in large pages."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from hal.cpus import CGROUP, PROC, control_groups, text_of

_PAGE = 1 << 21  # bytes of a huge page
_CHUNK = 1 << 26  # bytes that are mapped at once
_ALIGNED = 64
# Of control groups by their version: the files of limit and usage, and the entry of memory.stat for droppable pages.
_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
          2: ("memory.max", "memory.current", "inactive_file")}


def free_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes: MemAvailable, or less if a control group (version 1 or 2) leaves less. On a system without /proc it is all
    physical memory. Pages of files that can be dropped count as free."""
    free = _values(proc / "meminfo").get("MemAvailable:", 0) * 1024
    if not free:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder, version in control_groups("memory", proc, cgroup):
        limit, usage, droppable = _FILES[version]
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            free = min(free, max(most - used + _values(folder / "memory.stat").get(droppable, 0), 0))
    return free


def _number(path: Path) -> int | None:
    """The number in a file, or None if there is no such file or it says "max"."""
    text = text_of(path).strip()
    return int(text) if text.isdigit() else None


def _values(path: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for line in text_of(path).splitlines() if len(words := line.split()) > 1}


class HugePages:
    """Memory in pages of 2 MiB where Linux gives them. The processor fetches ahead only inside a page, so it reads
    weights in such pages up to 1.4 times as fast as in pages of 4 KiB. The memory is mapped in chunks, which exist as
    long as any tensor in them."""

    def __init__(self) -> None:
        self.left = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a tensor on the host."""
        size = tensor.numel() * tensor.element_size()
        if size > len(self.left):
            self.left = _mapped(max(size, _CHUNK))
        taken, self.left = self.left[:size], self.left[-(-size // _ALIGNED) * _ALIGNED:]
        return taken.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def anonymous(size: int) -> mmap.mmap:
    """Zeroed memory of `size` bytes, whose pages the system gives when they are first touched."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _mapped(size: int) -> torch.Tensor:
    """uint8 [size or more], zero. It takes no memory before it is written."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    held = anonymous(-(-size // _PAGE) * _PAGE + _PAGE)
    held.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(held, dtype=torch.uint8)  # keeps `held`
    return memory[-memory.data_ptr() % _PAGE:]
