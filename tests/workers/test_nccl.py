"""The data plane of a device, over a stand-in for NCCL: what ends a wait for a rank that is gone, and what an orderly
end leaves alone."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from nccl_stand_in import Group, StandInBackend
from rank_threads import on_ranks
from soon import SOON, soon
from torch._C._distributed_c10d import ErrorType
from worker_cases import MODEL, engine

from hal.config import Topology, WorkerConfig
from hal.contracts.outputs import SamplerOutput
from hal.errors import StateError, WorkerError
from runners.cuda.collectives import SETTINGS, NcclCollectives
from workers.control.collectives import CollectivePlane
from workers.data.axes import ByAxis
from workers.data.process_groups import TorchCommunicator
from workers.executors.connections import connect
from workers.links import liveness
from workers.links.groups import dist, make_group
from workers.links.liveness import PeerWatch
from workers.worker.generic import Worker

CPU = torch.device("cpu")
DYING = Path(__file__).with_name("dying_rank.py")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> StandInBackend:
    monkeypatch.setattr(liveness, "LINGER", 60.0)  # what has to end is waited for, however busy the machine is
    monkeypatch.delenv("HAL_STRICT", raising=False)  # strict ranks compare over gloo, which notices by itself
    return StandInBackend()


def joined(backend: StandInBackend, tp: int, pp: int) -> list[Any]:
    """Each rank's links, as a worker makes them."""
    def link(rank: int, store: Any) -> Any:
        config = WorkerConfig(engine(tp=tp, pp=pp, control_plane="collectives"), MODEL, Topology(tp, pp, rank))
        return connect(config, backend, CPU, store)

    return on_ranks(tp * pp, link)


def close(*calls: Any) -> None:
    on_ranks(len(calls), lambda rank, _: calls[rank].close())


def ended(thread: str = "hal-peer-watch") -> bool:
    return all(t.name != thread for t in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert soon(ended), "a thread waits for ranks for ever"


class Pair:
    """Rank 0's communicator. Rank 1 lives in a process that can be killed; it has issued what it does at the start."""

    def __init__(self, backend: StandInBackend, topology: Topology) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = f"{self.folder.name}/store"
        store = dist.FileStore(path, 2)
        self.process = forked.Popen([sys.executable, str(DYING), "peers of the data plane", path],
                                    stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        kind = backend.collectives
        groups, theirs = (ByAxis(topology, lambda axis, rank=rank: make_group(kind, store, axis.name, rank, 2))
                          for rank in (0, 1))
        threading.Thread(target=self.meet, args=(topology, *theirs.groups()), daemon=True).start()
        self.groups: list[Group] = groups.groups()
        self.communicator = TorchCommunicator(topology, CPU, groups, kind, backend.runtime,
                                              peers=PeerWatch(topology, store, "the data plane"))
        assert self.process.stdout.readline() == b"joined\n"

    @staticmethod
    def meet(topology: Topology, group: Group) -> None:
        if topology.tp > 1:
            group.allreduce([torch.zeros(1)], SimpleNamespace(asyncOp=False))
        else:
            group.recv([torch.zeros(1)], 0, 0).wait()

    def kill_soon(self) -> None:
        """When this rank has issued its next operation, which waits for the other; `killed` is when."""
        def issued() -> int:
            return sum(len(group.issued) + group.issuing for group in self.groups)

        def kill() -> None:
            soon(lambda: issued() > before)
            self.killed = time.monotonic()
            self.process.kill()

        before = issued()
        threading.Thread(target=kill).start()


@contextlib.contextmanager
def pair(backend: StandInBackend, **sizes: int) -> Iterator[Pair]:
    made = Pair(backend, Topology(**sizes))
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        made.process.stdout.close()  # type: ignore[union-attr]
        made.communicator.close()
        made.folder.cleanup()


def taken(communicator: Any, output: Any = "tokens") -> Callable[[], Any]:
    """What the driver's worker hands on of an output."""
    worker = Worker.__new__(Worker)
    worker.communicator, worker.runner = communicator, SimpleNamespace(fetch=lambda o: lambda: o)  # type: ignore[assignment]
    worker.output_type = object  # type: ignore[assignment]  # outputs are any values here
    return worker.fetch(output)


def send_and_receive(communicator: TorchCommunicator) -> None:
    from test_communicators import stage

    communicator.send(stage(3, 0))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "wait"), [({"tp": 2}, lambda c: c.all_reduce(torch.ones(3))),
                                             ({"tp": 2}, lambda c: c.all_gather(torch.ones(3))),
                                             ({"pp": 2}, send_and_receive)], ids=["all_reduce", "all_gather", "send"])
def test_ranks_that_wait_for_a_killed_rank_get_an_error_and_no_output(
        backend: StandInBackend, sizes: dict[str, int], wait: Callable[[Any], Any]) -> None:
    with pair(backend, **sizes) as ranks:
        communicator = ranks.communicator
        fetch = taken(communicator)
        assert fetch() == "tokens"
        ranks.kill_soon()
        with contextlib.suppress(WorkerError):  # where the operation is one of several
            wait(communicator)  # the device's wait, which nothing tells that it ended early
        assert soon(lambda: all(group.aborted for group in ranks.groups))
        calls = (fetch, communicator.end_step, lambda: communicator.all_reduce(torch.ones(1)) if "tp" in sizes
                 else send_and_receive(communicator))
        for call in calls:
            with pytest.raises(WorkerError, match="one is gone") as error:
                call()
            assert error.value.rank == -1 and 0 <= time.monotonic() - ranks.killed < SOON


@pytest.mark.slow
def test_an_output_that_another_rank_sampled_is_not_trusted_either(backend: StandInBackend) -> None:
    with pair(backend, pp=2) as ranks:
        worker = Worker.__new__(Worker)
        worker.communicator = communicator = ranks.communicator
        sealed = communicator.fingerprint.seal(SamplerOutput(token_ids=torch.zeros(1, dtype=torch.int32)).to_buffer())
        worker.plane = SimpleNamespace(receive_output=lambda: sealed)  # type: ignore[assignment]
        take = worker.receive_output()
        take()
        ranks.process.kill()
        assert soon(lambda: communicator._peers.lost)
        with pytest.raises(WorkerError, match="one is gone"):
            take()


@pytest.mark.slow
def test_graphs_delay_an_abort_but_not_waiting_ranks_or_the_shutdown(backend: StandInBackend,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LINGER", 0.5)
    with pair(backend, tp=2) as ranks:
        ranks.groups[0].graphs.clear()
        ranks.kill_soon()
        ranks.communicator.all_reduce(torch.ones(3))
        assert time.monotonic() - ranks.killed < SOON
        start = time.monotonic()
        ranks.communicator.close()
        assert time.monotonic() - start < SOON and not ended()
        ranks.groups[0].graphs.set()


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_an_abort_waits_for_an_issue_unless_the_issue_waits_too(backend: StandInBackend, full: bool,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue of the device holds the host in the call: it empties when the kernel in front ends."""
    with pair(backend, tp=2) as ranks:
        group, aborted = ranks.groups[0], []
        group.queue.clear()

        def empty() -> None:
            soon(lambda: ranks.communicator._peers.lost)
            time.sleep(0.1)  # it would be aborted meanwhile
            aborted.append(group.aborted)
            group.queue.set()

        if not full:
            monkeypatch.setattr(liveness, "_ISSUE", 2.0)  # the stand-in's operation is issued, and waits, that long
            threading.Thread(target=empty).start()
        ranks.kill_soon()
        ranks.communicator.all_reduce(torch.ones(3))  # the stand-in asserts that no abort came between
        assert time.monotonic() - ranks.killed < SOON and aborted == ([] if full else [False])
        assert group.aborted


@pytest.mark.slow
def test_an_error_that_nccl_reports_ends_the_groups(backend: StandInBackend) -> None:
    links = joined(backend, tp=2, pp=1)
    next(g for g in backend.collectives.made if not g.small).error = ErrorType.COMM_ERROR
    communicators = [communicator for _, communicator in links]
    assert soon(lambda: any(c._peers.lost for c in communicators))
    with pytest.raises(WorkerError, match="one is gone"):
        next(c for c in communicators if c._peers.lost).check()
    close(*(link for rank in links for link in rank))


def test_all_connections_are_made_before_the_first_step(backend: StandInBackend) -> None:
    links = joined(backend, tp=2, pp=3)
    assert all(isinstance(p, CollectivePlane) and c.capturable for p, c in links)
    data = [group for group in backend.collectives.made if not group.small]
    assert sorted(group.size for group in data) == [2] * 6 + [3] * 6
    for group in data:
        neighbours = [(group.rank + a, group.rank + b) for a, b in ((-1, 0), (0, 1))]
        pairs = {p for p in neighbours if min(p) >= 0 and max(p) < 3}
        assert set(group.counts) == ({"collective"} if group.size == 2 else pairs)
    close(*(link for rank in links for link in rank))
    assert all(group.aborted for group in backend.collectives.made)


def test_ranks_that_leave_one_after_another_are_no_failure(backend: StandInBackend,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_LEFT", 60.0)
    (_, driver), (_, second), (_, third) = links = joined(backend, tp=3, pp=1)
    mine = [group for group in backend.collectives.made if group.rank == 0]
    second.close()
    time.sleep(0.1)
    third.close()
    time.sleep(0.1)
    driver.check()
    driver.end_step()
    assert taken(driver)() == "tokens" and not any(group.aborted for group in mine)
    start = time.monotonic()
    driver.close()
    assert time.monotonic() - start < SOON and not driver._peers
    close(*(plane for plane, _ in links))
    assert all(group.aborted for group in backend.collectives.made)


def test_the_driver_leaves_last_if_the_others_do_soon(backend: StandInBackend) -> None:
    links = joined(backend, tp=2, pp=1)
    (_, driver), (_, other) = links
    left: list[bool] = []
    timer = threading.Timer(0.3, lambda: (left.append(True), other.close()))
    timer.start()
    start = time.monotonic()
    driver.close()
    assert left and time.monotonic() - start < SOON
    timer.join()
    close(*(plane for plane, _ in links))


def test_groups_are_aborted_though_their_watch_is_slower_than_the_close(backend: StandInBackend,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    class LatePoll:
        def __init__(self) -> None:
            self.poll_ = select.poll()
            self.register, self.unregister = self.poll_.register, self.poll_.unregister

        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            found = self.poll_.poll(milliseconds)
            time.sleep(0.5 if found else 0.0)
            return found

    monkeypatch.setattr(liveness, "select", SimpleNamespace(poll=LatePoll, POLLIN=select.POLLIN))
    monkeypatch.setattr(liveness, "LINGER", 0.1)
    (first, driver), (second, other) = joined(backend, tp=2, pp=1)
    other.close()
    assert soon(lambda: all(group.aborted for group in backend.collectives.made if group.rank and not group.small))
    close(driver, first, second)


@pytest.mark.slow
def test_a_rank_that_goes_on_after_another_has_left_gets_an_error(backend: StandInBackend) -> None:
    links = joined(backend, tp=2, pp=1)
    (_, driver), (_, other) = links
    other.close()
    start = time.monotonic()
    with contextlib.suppress(WorkerError):  # where that is noticed before
        driver.all_reduce(torch.ones(2))
    with pytest.raises(WorkerError, match="one is gone"):
        driver.check()
    assert time.monotonic() - start < SOON
    close(driver, *(plane for plane, _ in links))


def test_a_capture_compares_nothing_and_the_step_does(backend: StandInBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_STRICT", "1")
    links = joined(backend, tp=2, pp=1)

    def capture(rank: int) -> None:
        communicator = links[rank][1]
        communicator._checks = {"tp": SimpleNamespace()}  # with which nothing can be compared
        assert communicator.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0]
        assert communicator.all_gather(torch.ones(1)).tolist() == [1.0, 1.0]

    checks = [communicator._checks for _, communicator in links]
    assert all(checks)
    backend.runtime.capture = True
    on_ranks(2, lambda rank, _: capture(rank))
    backend.runtime.capture = False

    def step(rank: int) -> None:
        communicator = links[rank][1]
        communicator._checks = checks[rank]
        communicator.fingerprint.begin(7, 1)  # then a graph is replayed, of which no rank counts the collectives
        communicator.end_step()
        communicator.fingerprint.begin(8 + rank, 1)
        with pytest.raises(StateError, match="differ in step"):
            communicator.end_step()

    on_ranks(2, lambda rank, _: step(rank))
    close(*(link for rank in links for link in rank))


@pytest.mark.parametrize("before", [None, "3"])
def test_no_thread_of_pytorch_may_end_the_process(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """What these settings do is PyTorch's; here: that a group is made with them, and no other of the process is."""
    seen: list[dict[str, str]] = []

    class Options(SimpleNamespace):
        def __init__(self, is_high_priority_stream: bool) -> None:
            super().__init__(is_high_priority_stream=is_high_priority_stream, config=SimpleNamespace())

        def eager_connect_single_device(self, device: torch.device) -> None:
            assert device == torch.device("cuda", 0)

    def nccl(store: Any, rank: int, size: int, options: Any) -> Any:
        seen.append({name: os.environ[name] for name in SETTINGS})
        return options

    nccl.Options = Options  # type: ignore[attr-defined]
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    large, small = (make_group(NcclCollectives(), dist.HashStore(), "x", 0, 1, control=c) for c in (False, True))
    assert seen == [SETTINGS] * 2 and os.environ.get(name) == before
    assert large._timeout.days == small._timeout.days == 3650
    assert small.config.max_ctas == 1 and small.is_high_priority_stream and not large.is_high_priority_stream


class TenfoldSums:
    """A PeerSums that takes tensors of up to 8 elements. Its "sum" shows which way a tensor went."""

    def __init__(self) -> None:
        self.settled, self.calls, self.aborted, self.closed = False, 0, 0, 0

    def settle(self, other: Callable[[torch.Tensor], object]) -> None:
        x = torch.ones(9)
        other(x)
        self.settled = x.tolist() == [2.0] * 9

    def takes(self, x: torch.Tensor) -> bool:
        return self.settled and x.numel() <= 8

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * 10

    def abort(self) -> None:
        self.aborted += 1

    def close(self) -> None:
        self.closed += 1


def test_small_sums_go_the_way_that_the_backend_supplies(backend: StandInBackend,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[TenfoldSums] = []

    def sums(self: Any, store: Any, rank: int, size: int, device: torch.device) -> TenfoldSums:
        ways.append(TenfoldSums())
        return ways[-1]

    monkeypatch.setattr(type(backend.collectives), "sums", sums)
    ranks = joined(backend, 2, 1)

    def add(rank: int, _: Any) -> list[list[float]]:
        communicator = ranks[rank][1]
        return [communicator.all_reduce(torch.full((n,), rank + 1.0)).tolist() for n in (8, 9)]

    assert on_ranks(2, add) == [[[10.0] * 8, [3.0] * 9], [[20.0] * 8, [3.0] * 9]]
    assert [way.calls for way in ways] == [1, 1]
    close(*(communicator for _, communicator in ranks))
    assert all(way.aborted == way.closed == 1 for way in ways)
    close(*(plane for plane, _ in ranks))
