"""Sums over peer memory: the kernel in Triton's interpreter, with the ranks one after the other, and two GPUs."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_adds_what_the_others_have_written(dtype: torch.dtype, world: int) -> None:
    """A rank that is told to abort writes its part, tells the others and does not wait, so ranks may take turns here.
    The last one then finds all parts. Halves of the memory take turns, and sizes differ from call to call."""
    if torch.cuda.is_available():
        pytest.skip("ranks take turns only where kernels run on the host")
    from runners.cuda.kernels import sums

    memory = [torch.zeros(2 * sums.HALF, dtype=torch.uint8) for _ in range(world)]
    flags = [torch.zeros(sums.PROGRAMS, world, dtype=torch.int32) for _ in range(world)]
    epochs = [torch.zeros(sums.PROGRAMS, dtype=torch.int32) for _ in range(world)]
    places, marks = (torch.tensor([t.data_ptr() for t in tensors]) for tensors in (memory, flags))
    torch.manual_seed(0)
    for turn, count in enumerate((3000, 1, 5000, 1024)):
        parts = [torch.randn(count).to(dtype) for _ in range(world)]
        order = [(turn + i) % world for i in range(world)]
        for rank in order:
            aborted = torch.tensor([int(rank != order[-1])], dtype=torch.int32)
            found = sums.peer_sum(parts[rank], places, marks, epochs[rank], aborted, rank, world)
        expected = torch.zeros(count)
        for part in parts:
            expected += part.float()
        assert torch.equal(found, expected.to(dtype))
    assert all(torch.equal(epoch, epochs[0]) for epoch in epochs)
    assert all(int(flags[0][0, other]) == 4 for other in range(1, world))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_add_up_in_graphs() -> None:
    """Through the communicator of rank 0, whose sums of small tensors take peer memory where this is the faster way."""
    from hal.engine.llm import LLM

    with LLM(device="cuda", num_blocks=500, tp=2) as llm:
        ways = llm.executor._worker.communicator._faster  # type: ignore[attr-defined]
        print(ways["tp"].measured)
        assert ways["tp"].limit >= 4 << 10
        assert [o.text for o in llm.generate(["37+85=", "999+1="])] == ["122", "1000"]
