"""Programmatic dependent launch (compute capability 9.0 and up): a kernel's programs start before the previous kernel
has ended, and wait inside. In a graph of many small kernels the gaps between kernels take half of the time."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl

COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")  # not interpreted, which takes no PTX


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait for the launches before this one. Every program calls it before it writes, and before it reads memory that
    the launches before it write. The next kernel relies on this."""
    if PDL:  # in PTX, since Triton 3.4's own function cannot be called
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=tl.int32,
                                  is_pure=False, pack=1)
        tl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False,
                                  pack=1)


@triton.jit
def wait_then_launch(PDL: tl.constexpr):
    """As wait_for_inputs, but the next kernel's programs start only after it. Before they wait themselves they may read
    what the launches before this one write. They bypass the multiprocessor's own cache (cache_modifier=".cg")."""
    if PDL:
        tl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False,
                                  pack=1)
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=tl.int32,
                                  is_pure=False, pack=1)


@functools.cache
def _supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(x: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch on x's device."""
    return {"PDL": True, "launch_pdl": True} if _supported(x.device) else {"PDL": False}


@functools.cache
def program_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0
