"""all_reduce of small tensors over memory that the GPUs of a host read of each other (NVLink or PCIe peer access), in
one launch that a graph may capture. One shot: each rank puts its part where the others read it, and adds up all.

A program of one rank waits for the same program of each other rank only, so no program waits for one that has not
started. Every rank adds in the order of the ranks, in fp32, so that all get the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.launch import launch_options, wait_for_inputs

PROGRAMS = 128  # at most; all must be able to run at once beside what else the GPU does
SLICE = 16 << 10  # bytes of a rank's memory that a program has in each half
HALF = PROGRAMS * SLICE  # bytes; halves take turns: a rank writes one while others may still read the other
LIMIT = 1 << 20  # bytes of a tensor; a larger one has a better algorithm


@triton.jit(do_not_specialize=["count"])
def _sum(x, out, memory, flags, epochs, aborted, count, RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr,
         HALF: tl.constexpr, SLICE: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    at = program * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    start = ((epoch & 1) * HALF + program * SLICE) // (x.dtype.element_ty.primitive_bitwidth // 8)
    inside = start + tl.arange(0, BLOCK)
    own = tl.load(memory + RANK).to(tl.pointer_type(x.dtype.element_ty))
    tl.store(own + inside, tl.load(x + at, mask=here, other=0.0), mask=here)
    tl.debug_barrier()  # all threads have stored before one of them tells the others
    for other in tl.static_range(WORLD):
        if other != RANK:
            theirs = tl.load(flags + other).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + program * WORLD + RANK, epoch, sem="release", scope="sys")
    mine = tl.load(flags + RANK).to(tl.pointer_type(tl.int32))
    for other in tl.static_range(WORLD):
        if other != RANK:
            seen = tl.atomic_add(mine + program * WORLD + other, 0, sem="acquire", scope="sys")
            while (seen < epoch) & (tl.load(aborted, volatile=True) == 0):
                seen = tl.atomic_add(mine + program * WORLD + other, 0, sem="acquire", scope="sys")
    tl.debug_barrier()  # no thread reads before one of them has seen all flags
    total = tl.zeros((BLOCK,), tl.float32)
    for other in tl.static_range(WORLD):
        part = tl.load(memory + other).to(tl.pointer_type(x.dtype.element_ty))
        total += tl.load(part + inside, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(x.dtype.element_ty), mask=here)
    tl.store(epochs + program, epoch)


def peer_sum(x: torch.Tensor, memory: torch.Tensor, flags: torch.Tensor, epochs: torch.Tensor, aborted: torch.Tensor,
             rank: int, world: int) -> torch.Tensor:
    """The sum of the ranks' x, a new tensor.

    Args:
        x: contiguous, 16 or 32 bits an element, at most LIMIT bytes; the same shape on all ranks.
        memory, flags: int64 [world], addresses of each rank's 2 * HALF bytes, and of its int32 [PROGRAMS, world],
            which are zero when the first call begins.
        epochs: int32 [PROGRAMS] of this rank, zero at first. aborted: int32 [1] of this rank; when it is not zero,
            nothing is waited for, and the result is wrong.
    """
    out, count = torch.empty_like(x), x.numel()
    block = 1024
    while block * PROGRAMS < count:
        block *= 2
    _sum[(triton.cdiv(count, block),)](x, out, memory, flags, epochs, aborted, count, RANK=rank, WORLD=world,
                                       BLOCK=block, HALF=HALF, SLICE=SLICE, num_warps=min(block // 256, 16),
                                       **launch_options(x))
    return out
