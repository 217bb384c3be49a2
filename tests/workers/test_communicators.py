"""What every data plane of a host's CPU does: sums and rows side by side, stages that hand on, ends noticed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from drill import left_in_shared_memory, shared_memory
from nccl_stand_in import StandInBackend
from rank_threads import on_ranks
from soon import SOON
from worker_cases import MODEL, engine

from hal.config import Topology, WorkerConfig
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import IntermediateTensors
from hal.errors import GuardError, InputError, StateError, WireError, WorkerError
from hal.guard import Phase, phase
from hal.schema import Array
from hal.testing.null import backend as null
from workers.data.process_groups import TorchCommunicator
from workers.data.shared_memory import ShmCommunicator
from workers.executors.connections import connect, over_groups
from workers.links.groups import dist

CPU = torch.device("cpu")
DYING = Path(__file__).with_name("dying_rank.py")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
Stage = IntermediateTensors.declare("Stage", hidden=Array("bfloat16", "num_tokens", 48),
                                    sums=Array("int64", "num_tokens"), rest=Array("float32", "num_tokens", 3))
Other = IntermediateTensors.declare("Other", hidden=Array("bfloat16", "num_tokens", 40))
on_each_torch = pytest.mark.torch_release


def make(kind: str, topology: Topology, store: Any) -> Communicator:
    if kind == "shm":
        return ShmCommunicator(topology, CPU, store)
    return over_groups(topology, StandInBackend() if kind == "nccl" else null, CPU, store, strict=True)


def on(kind: str, tp: int, pp: int, call: Any) -> list[Any]:
    """What `call(communicator)` returns on each rank."""
    def run(rank: int, store: Any) -> Any:
        communicator = make(kind, Topology(tp, pp, rank), store)
        try:
            return call(communicator)
        finally:
            communicator.close()
            communicator.close()

    return on_ranks(tp * pp, run)


def random(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 100
    return values.to(dtype)


def stage(tokens: int, seed: int) -> Any:
    return Stage(hidden=random(seed, tokens, 48, dtype=torch.bfloat16),
                 sums=random(seed + 1, tokens, dtype=torch.int64), rest=random(seed + 2, tokens, 3))


@pytest.fixture(autouse=True)
def _nothing_in_shared_memory() -> Iterator[None]:
    before = shared_memory()
    yield
    assert not left_in_shared_memory(before)


@on_each_torch
@pytest.mark.parametrize("kind", ["shm", "gloo", "nccl"])
class TestEveryCommunicator:
    @pytest.mark.slow
    @pytest.mark.parametrize("tp", [2, 3])
    def test_sums_are_right_and_the_same_on_every_rank(self, kind: str, tp: int) -> None:
        """Sizes of one place, of many (and then of shared additions), of nothing; twice each, as places take turns."""
        shapes = [(7, 5), (1,), (3, 0), (300_000,), (64, 9), (700, 1000)]

        def call(communicator: Communicator) -> list[torch.Tensor]:
            return [communicator.all_reduce(random(communicator.topology.rank + 10 * turn, *shape, dtype=dtype))
                    for dtype in DTYPES for shape in shapes for turn in range(2)]

        results = on(kind, tp, 1, call)
        cases = [(dtype, shape, turn) for dtype in DTYPES for shape in shapes for turn in range(2)]
        for i, (dtype, shape, turn) in enumerate(cases):
            assert all(torch.equal(result[i], results[0][i]) for result in results)
            parts = [random(rank + 10 * turn, *shape, dtype=dtype).double() for rank in range(tp)]
            expected, got = sum(parts), results[0][i]
            assert got.dtype == dtype and got.shape == shape
            bound = sum(p.abs() for p in parts) * (0 if dtype == torch.int64 else torch.finfo(dtype).eps * tp)
            assert bool(((got.double() - expected).abs() <= bound).all()), (dtype, shape)

    def test_a_sum_is_in_place_where_that_is_possible(self, kind: str) -> None:
        def call(communicator: Communicator) -> None:
            x = torch.full((4, 6), communicator.topology.rank + 1.0)
            assert communicator.all_reduce(x) is x and x.unique().tolist() == [3.0]
            strided = torch.full((4, 6), 1.0)[:, ::2]
            assert communicator.all_reduce(strided).tolist() == [[2.0] * 3] * 4

        on(kind, 2, 1, call)

    @pytest.mark.slow
    @pytest.mark.parametrize("tp", [2, 3])
    def test_rows_are_gathered_side_by_side(self, kind: str, tp: int) -> None:
        shapes = [(5, 3), (2, 3, 4), (0, 4), (9,), (1200, 301)]

        def call(communicator: Communicator) -> list[torch.Tensor]:
            return [communicator.all_gather(random(communicator.topology.rank, *shape, dtype=dtype))
                    for dtype in DTYPES for shape in shapes]

        results = on(kind, tp, 1, call)
        for i, (dtype, shape) in enumerate((dtype, shape) for dtype in DTYPES for shape in shapes):
            expected = torch.cat([random(rank, *shape, dtype=dtype) for rank in range(tp)], -1)
            assert all(torch.equal(result[i], expected) for result in results), (dtype, shape)

    def test_results_are_the_callers_own(self, kind: str) -> None:
        def call(communicator: Communicator) -> None:
            rank = communicator.topology.rank
            first = communicator.all_gather(torch.full((2,), rank))
            for _ in range(4):
                communicator.all_gather(torch.full((2,), 7))
            assert first.tolist() == [0, 0, 1, 1]

        on(kind, 2, 1, call)

    @pytest.mark.slow
    def test_stages_hand_on(self, kind: str) -> None:
        """Through three stages of two ranks, sizes that change, several on their way; and what came is kept."""
        sizes = (3, 1, 0, 9000, 2, 40_000, 5)

        def call(communicator: Communicator) -> None:
            topology = communicator.topology
            kept = []
            for i, tokens in enumerate(sizes):
                if topology.is_first_stage:
                    found = stage(tokens, 100 * topology.tp_rank + i)
                else:
                    found = communicator.recv(Stage, {"num_tokens": tokens})
                    found.validate(CPU)
                kept.append(found)
                assert communicator.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0]
                if not topology.is_last_stage:
                    communicator.send(found)
            for i, (tokens, found) in enumerate(zip(sizes, kept, strict=True)):
                wanted = stage(tokens, 100 * topology.tp_rank + i)
                assert all(torch.equal(found[n], wanted[n]) for n in ("hidden", "sums", "rest"))

        on(kind, 2, 3, call)

    def test_a_missing_tensor_is_named(self, kind: str) -> None:
        def call(communicator: Communicator) -> None:
            if communicator.topology.is_first_stage:
                with pytest.raises(InputError, match="sums is missing"):
                    communicator.send(Stage(hidden=random(0, 1, 48), sums=None, rest=random(0, 1, 3)))

        on(kind, 1, 2, call)

    @pytest.mark.slow
    @pytest.mark.parametrize(("calls", "field"), [
        (lambda c, r: (c.fingerprint.begin(3 + r, 5), c.all_reduce(torch.ones(2))), "step"),
        (lambda c, r: (c.fingerprint.begin(3, 5 + r), c.all_gather(torch.ones(2))), "input digest"),
        (lambda c, r: (c.fingerprint.begin(3, 5), (c.all_gather if r else c.all_reduce)(torch.ones(2))), "operation"),
        (lambda c, r: (c.fingerprint.begin(3, 5), c.all_reduce(torch.ones(2 + r))), "bytes"),
        (lambda c, r: (c.fingerprint.begin(3, 5), c.all_reduce(torch.ones(400_000 * (1 + r)))), "bytes")])
    def test_ranks_that_diverge_are_named_before_they_hang(self, kind: str, calls: Any, field: str) -> None:
        def call(communicator: Communicator) -> None:
            rank = communicator.topology.rank
            for step in (1, 2):  # in these they agree
                communicator.fingerprint.begin(step, 99)
                for _ in range(3):
                    communicator.all_reduce(torch.ones(5))
                communicator.end_step()
            with pytest.raises(StateError, match=f"rank {1 - rank} .*differ in {field}"):
                calls(communicator, rank)

        on(kind, 2, 1, call)

    def test_a_rank_with_fewer_collectives_is_named(self, kind: str) -> None:
        """It waits for the next step, which the other would never reach."""
        def call(communicator: Communicator) -> None:
            rank = communicator.topology.rank
            communicator.fingerprint.begin(1, 9)
            for _ in range(2):
                communicator.all_reduce(torch.ones(5))
            if rank == 0:
                with pytest.raises(StateError, match=r"rank 1 .*collectives?") as error:
                    communicator.all_reduce(torch.ones(5))
                assert "2" in error.value.got and "3" in error.value.expected
            elif kind == "shm":
                communicator.end_step()
            else:
                with pytest.raises(StateError, match="differ in number of collectives"):
                    communicator.end_step()

        on(kind, 2, 1, call)

    def test_prepare_has_no_data_plane(self, kind: str) -> None:
        def call(communicator: Communicator) -> None:
            with phase(Phase.PREPARE), pytest.raises(GuardError, match="prepare"):
                communicator.all_reduce(torch.ones(1))
            with phase(Phase.EXECUTE):
                assert communicator.all_reduce(torch.ones(1)).item() == 2

        on(kind, 2, 1, call)


@pytest.mark.parametrize(("device", "plane", "kind"), [
    ("cpu", "auto", ShmCommunicator), ("cpu", "shm", ShmCommunicator), ("cpu", "gloo", TorchCommunicator),
    ("cpu", "collectives", TorchCommunicator), ("cuda", "shm", TorchCommunicator)])
def test_ranks_of_one_host_share_memory_unless_told_otherwise(device: str, plane: str, kind: type) -> None:
    def call(rank: int, store: Any) -> type:
        config = WorkerConfig(engine(tp=2, control_plane=plane), MODEL, Topology(tp=2, rank=rank))
        links = connect(config, null, torch.device(device), store)
        for link in links:
            link.close()
        return type(links[1])

    assert on_ranks(2, call) == [kind] * 2


def test_sums_of_halves_are_rounded_once() -> None:
    """In the order of ranks: 256 + 1 + 1 in bfloat16 would stay 256, rounded each time."""
    for dtype, big in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        sums = on("shm", 3, 1, lambda c, d=dtype, b=big: c.all_reduce(torch.tensor([b if c.topology.rank == 0 else 1.0],
                                                                                  dtype=d)))
        assert [s.item() for s in sums] == [big + 2] * 3


def test_another_size_than_declared_is_a_named_error() -> None:
    def call(communicator: Communicator) -> None:
        if communicator.topology.is_first_stage:
            communicator.send(stage(4, 0))
        else:
            with pytest.raises(WireError, match=r"Other\.hidden arrived in another size") as error:
                communicator.recv(Other, {"num_tokens": 4})
            assert "384 bytes" in error.value.got and "320 bytes" in error.value.expected

    on("shm", 1, 2, call)


@pytest.mark.parametrize("kind", ["shm", "gloo", "nccl"])
def test_stages_in_different_steps_are_named(kind: str) -> None:
    def call(communicator: Communicator) -> None:
        communicator.fingerprint.begin(4 + communicator.topology.rank, 1)
        if communicator.topology.is_first_stage:
            with contextlib.suppress(WorkerError):  # gloo sends when the other takes it
                communicator.send(stage(4, 0))
        else:
            with pytest.raises(StateError, match=r"rank 0 .*differ in step"):
                communicator.recv(Stage, {"num_tokens": 4})

    on(kind, 1, 2, call)


def wait_for_a_killed_peer(folder: Path, collective: Callable[[ShmCommunicator], object]) -> None:
    """The collective names the peer in time."""
    path = str(folder / "store")
    store = dist.FileStore(path, 2)
    with forked.Popen([sys.executable, str(DYING), "data", path], stdout=subprocess.PIPE) as other:
        communicator = ShmCommunicator(Topology(tp=2), CPU, store)
        assert other.stdout is not None and other.stdout.readline() == b"joined\n"
        killed: list[float] = []
        threading.Timer(0.3, lambda: (killed.append(time.monotonic()), other.kill())).start()
        with pytest.raises(WorkerError, match="rank 1 is gone") as error:
            collective(communicator)
        assert error.value.rank == -1 and 0 <= time.monotonic() - killed[0] < SOON
        communicator.close()


@pytest.mark.slow
def test_a_rank_that_waits_for_a_killed_peer_gets_an_error(tmp_path: Path) -> None:
    wait_for_a_killed_peer(tmp_path, lambda communicator: communicator.all_reduce(torch.ones(3)))
