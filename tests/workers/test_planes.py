"""What every control plane does, whichever it is; and what shared memory adds."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from drill import left_in_shared_memory, shared_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from nccl_stand_in import StandInBackend
from rank_threads import on_ranks
from soon import SOON

from hal.config import Topology
from hal.contracts.control_plane import ControlPlane
from hal.errors import BackendError, GuardError, WireError, WorkerError
from hal.guard import Phase, phase
from hal.testing.null import backend as null
from workers.control.collectives import CPU, GlooPlane
from workers.control.planes import LocalPlane, make_plane
from workers.control.shared_memory import ShmPlane
from workers.links import liveness
from workers.links import memory as shm
from workers.links.groups import dist
from workers.links.memory import Segment
from workers.links.ring import Ring

PLANES = ("gloo", "shm", "collectives", "nccl", pytest.param("ray", marks=pytest.mark.slow))
DYING = Path(__file__).with_name("dying_rank.py")


def data(*sizes: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, np.uint8) for size in sizes]


def same(received: list[np.ndarray], sent: list[np.ndarray]) -> bool:
    return [r.tobytes() for r in received] == [s.tobytes() for s in sent]


def make(name: str, topology: Topology, store: Any) -> ControlPlane:
    """"nccl" is the plane "collectives" where these are a device's, which do as NCCL's."""
    if name == "nccl":
        return make_plane("collectives", topology, store, StandInBackend(), CPU)
    return make_plane(name, topology, store, null, CPU)


@contextlib.contextmanager
def joined(name: str, topology: Topology) -> Iterator[list[ControlPlane]]:
    made = on_ranks(topology.world_size, lambda rank, store: make(
        name, Topology(topology.tp, topology.pp, rank), store))
    try:
        yield made
    finally:
        for plane in reversed(made):
            plane.close()
            plane.close()


def together(*calls: Callable[[], Any]) -> list[Any]:
    return on_ranks(len(calls), lambda rank, _: calls[rank]())


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _what_a_plane_needs(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else ""
    if name == "ray":
        request.getfixturevalue("ray")


@pytest.fixture(autouse=True)
def _nothing_in_shared_memory() -> Iterator[None]:
    before = shared_memory()
    yield
    assert not left_in_shared_memory(before)


@pytest.mark.parametrize("name", PLANES)
class TestEveryPlane:
    def test_messages_arrive_whole_and_in_order(self, name: str) -> None:
        """Small and large by turns, of no, one and several parts, some empty; and the end."""
        messages = [data(*sizes, seed=i) for i, sizes in enumerate([
            (5,), (70_000, 300), (0, 1, 0), (3_000_000, 64, 5_000_001), (10,), (1 << 20,), (64, 63, 65), (0,)])]

        def drive() -> None:
            for message in messages:
                parts = [part.copy() for part in message]
                planes_[0].broadcast(parts)
                for part in parts:
                    part[:] = 0  # it may be changed as soon as broadcast has returned
            planes_[0].broadcast([])

        def follow(plane: ControlPlane) -> None:
            for message in messages:
                received = plane.receive()
                assert same(received, message)
                assert all(part.__array_interface__["data"][0] % 64 == 0 for part in received if part.size)
            assert plane.receive() == []

        with joined(name, Topology(tp=3)) as planes_:
            together(drive, lambda: follow(planes_[1]), lambda: follow(planes_[2]))

    def test_views_last_until_the_next_call(self, name: str) -> None:
        def follow() -> None:
            for i in range(4):
                received = other.receive()
                time.sleep(0.02)  # the driver goes on meanwhile
                assert same(received, data(40_000, 7, seed=i))

        with joined(name, Topology(tp=2)) as (driver, other):
            together(lambda: [driver.broadcast(data(40_000, 7, seed=i)) for i in range(4)], follow)

    def test_outputs_come_back_in_order_while_steps_go_on(self, name: str) -> None:
        """From the last stage; the driver is several steps ahead before it asks for the first output."""
        outputs = [data(size, seed=i)[0] for i, size in enumerate((10, 100_000, 0, 600_000, 64, 9))]

        def drive(driver: ControlPlane) -> None:
            for i in range(len(outputs)):
                driver.broadcast(data(100, seed=i))
            for output in outputs:
                assert driver.receive_output().tobytes() == output.tobytes()

        def sample(plane: ControlPlane) -> None:
            for i, output in enumerate(outputs):
                assert same(plane.receive(), data(100, seed=i))
                kept = output.copy()
                plane.send_output(kept)
                kept[:] = 0

        with joined(name, Topology(pp=3)) as made:
            together(lambda: drive(made[0]), lambda: [made[1].receive() for _ in outputs], lambda: sample(made[2]))

    def test_calls_of_a_closed_plane_raise(self, name: str) -> None:
        with joined(name, Topology(tp=2)) as made:
            for plane in reversed(made):
                plane.close()
            for call in (lambda: made[0].broadcast(data(3)), made[1].receive, made[0].receive_output):
                with pytest.raises(WorkerError, match="closed") as error:
                    call()
                assert error.value.rank == -1

    @pytest.mark.slow
    def test_a_rank_that_waits_for_a_killed_peer_gets_an_error(self, name: str, tmp_path: Path) -> None:
        path = str(tmp_path / "store")
        store = dist.FileStore(path, 2)
        # NCCL's stand-in joins threads: its other rank is a process that has the lifeline alone.
        topology, kind = Topology(pp=2), name
        if name == "nccl":
            topology, kind = Topology(tp=2), "peers of the control plane"
        with forked.Popen([sys.executable, str(DYING), kind, path], stdout=subprocess.PIPE) as other:
            plane = make(name, topology, store)
            assert other.stdout is not None and other.stdout.readline() == b"joined\n"
            killed: list[float] = []
            threading.Timer(0.3, lambda: (killed.append(time.monotonic()), other.kill())).start()
            if name != "nccl":
                with pytest.raises(WorkerError) as error:
                    plane.receive_output()
                assert error.value.rank == -1 and 0 <= time.monotonic() - killed[0] < SOON
            with pytest.raises(WorkerError) as error:
                for _ in range(100):
                    plane.broadcast(data(10_000))
            assert error.value.rank == -1 and 0 <= time.monotonic() - killed[0] < SOON
            plane.close()

    def test_phases_that_forbid_communication_refuse_it(self, name: str, guarded: None) -> None:
        with joined(name, Topology(tp=2)) as (driver, other):
            for where in (Phase.PREPARE, Phase.EXECUTE):
                for call in (lambda: driver.broadcast(data(3)), other.receive, lambda: other.send_output(data(3)[0]),
                             driver.receive_output):
                    with phase(where), pytest.raises(GuardError, match=where.value):
                        call()
            with phase(Phase.WORKER):
                together(lambda: driver.broadcast(data(3)), other.receive)


@pytest.fixture
def guarded() -> Iterator[None]:
    from hal import guard

    before = guard.installed_tier()
    guard.install(strict=False)
    yield
    if before is None:
        guard.uninstall()


def test_local_plane_has_no_receiver() -> None:
    plane = make("auto", Topology(), None)
    assert isinstance(plane, LocalPlane) and plane.receive() == []
    plane.broadcast(data(3))
    plane.close()
    plane.close()


def test_auto_is_shared_memory_or_else_gloo_on_every_rank(monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    with joined("auto", Topology(tp=2)) as made:
        assert [type(plane) for plane in made] == [ShmPlane] * 2
    assert not caplog.records
    hosts = (f"00000000-0000-0000-0000-{n:012d} pid:[1]" for n in itertools.count())
    monkeypatch.setattr(shm, "_host", lambda: next(hosts))  # each rank is on a host of its own
    with joined("auto", Topology(tp=2)) as made:
        assert [type(plane) for plane in made] == [GlooPlane] * 2
        together(lambda: made[0].broadcast(data(3)), lambda: made[1].receive())
    with pytest.raises(BackendError, match="cannot share memory") as error:
        on_ranks(2, lambda rank, store: make("shm", Topology(tp=2, rank=rank), store))
    assert "rank 1: it runs on another host" in error.value.got
    assert [record.getMessage() for record in caplog.records] == [
        "the control plane uses process groups, since the ranks cannot share memory: rank 1: it runs on another host, "
        "or in another container, than the driver"]  # said once, by the driver
    monkeypatch.setattr(shm, "_FUTEX", None)
    with joined("auto", Topology(tp=2)) as made:
        assert [type(plane) for plane in made] == [GlooPlane] * 2


def test_the_driver_of_nccl_ends_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory may hold what they are receiving."""
    monkeypatch.setattr(liveness, "LINGER", 60.0)
    with joined("nccl", Topology(tp=3)) as made:
        ended: list[int] = []

        def close(rank: int) -> None:
            time.sleep(0.05 * rank)
            if rank:
                ended.append(rank)  # before: the driver goes on as soon as the last has closed
            made[rank].close()
            if not rank:
                ended.append(rank)

        together(*(lambda rank=rank: close(rank) for rank in range(3)))
    assert len(ended) == 3 and ended[-1] == 0


def test_kernels_that_wait_are_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LINGER", 60.0)
    with joined("nccl", Topology(pp=2)) as made:
        groups = [group for plane in made for group in (plane._all, plane._pair)]
    assert [group.aborted for group in groups] == [True] * 4


def segments(world: int, size: int = 1 << 16) -> list[Segment]:
    return on_ranks(world, lambda rank, store: Segment("test", rank, world, store, size))


def test_memory_is_private_and_nameless_and_goes_with_its_users() -> None:
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if "hal-test" in line]

    made = segments(2)
    assert len(mapped()) == 2 and all("(deleted)" in line for line in mapped())
    kept = next(fd for fd in os.listdir("/proc/self/fd") if "hal-test" in os.readlink(f"/proc/self/fd/{fd}"))
    assert os.fstat(int(kept)).st_mode & 0o777 == 0o600
    with pytest.raises(PermissionError):
        os.ftruncate(int(kept), 64)  # else a peer could be made to crash
    for segment in made:
        segment.close()
    with pytest.raises(WorkerError, match="closed"):
        segment.wait(16, shm.START, 0)
    del segment, made
    gc.collect()
    assert not mapped()


def test_waiting_has_a_limit() -> None:
    made = segments(2)
    counter = made[0].counter()
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 was waited for 0 s") as error:
        made[0].wait(counter, shm.START + 1, 1, limit=0.3)
    assert error.value.rank == -1 and 0.3 <= time.monotonic() - start < shm.LIMIT / 10


def rings(slots: int, slot_bytes: int) -> tuple[Ring, Ring]:
    made = segments(2, slots * slot_bytes)
    writer, reader = (Ring(segment, 0, [1], slots, slot_bytes) for segment in made)
    return writer, reader


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1500), max_size=6)), min_size=1, max_size=12))
def test_ring_carries_any_sizes(messages: list[tuple[bool, list[int]]]) -> None:
    """Slots far smaller than messages, and fewer than their pieces; counters wrap on the way."""
    writer, reader = rings(3, 320)

    def read() -> None:
        for i, (own, sizes) in enumerate(messages):
            received = reader.receive(own)
            assert same(received, data(*sizes, seed=i))
            if own:
                kept.append((received, i, sizes))

    kept: list[Any] = []
    together(lambda: [writer.send(data(*sizes, seed=i)) for i, (_, sizes) in enumerate(messages)], read)
    assert all(same(received, data(*sizes, seed=i)) for received, i, sizes in kept)


def test_several_messages_are_in_flight() -> None:
    writer, reader = rings(4, 1024)
    for i in range(4):
        writer.send(data(900, seed=i))
    with pytest.raises(WorkerError, match="waited for"):
        writer.send(data(900, seed=4), limit=0.05)
    assert same(reader.receive(), data(900))
    with pytest.raises(WorkerError, match="waited for"):
        writer.send(data(900, seed=4), limit=0.05)  # the reader still has its views
    assert same(reader.receive(), data(900, seed=1))
    writer.send(data(900, seed=4), limit=0.05)
    assert [same(reader.receive(), data(900, seed=i)) for i in (2, 3, 4)] == [True] * 3


@pytest.mark.parametrize("damage", ["foreign", "corrupt", "truncated", "another"])
def test_bytes_that_are_not_a_message_are_refused(damage: str) -> None:
    writer, reader = rings(4, 256)
    writer.send(data(500) if damage == "truncated" else data(100))
    slots = [head for head, _ in reader._slots]
    at = shm.START % 4
    if damage == "foreign":
        slots[at][:4] = b"\x7fELF"
    elif damage == "corrupt":
        slots[at][20] ^= 1
    elif damage == "another":
        slots[at][:] = bytes(slots[at][:8]) + b"\1" * 56
    else:
        slots[(at + 1) % 4][:] = bytes(64)
    with pytest.raises(WireError, match="no message, or not the next"):
        reader.receive()


def test_too_many_parts_are_refused() -> None:
    writer, _ = rings(4, 256)
    with pytest.raises(WireError, match="too many parts"):
        writer.send(data(*[1] * 7))


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 2])
def test_waiting_costs_no_cpu(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    """With a core for each rank or fewer: 50 messages a second, and what a rank burns that waits for them. The best of
    some rounds counts, since a virtual machine that is stopped takes that time for its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    writer, reader, rounds = *rings(4, 1024), 3

    def read() -> float:
        reader.receive()
        used = []
        for _ in range(rounds):
            start = time.thread_time()
            for _ in range(20):
                reader.receive()
            used.append(time.thread_time() - start)
        return min(used)

    def write() -> None:
        for i in range(1 + 20 * rounds):
            writer.send(data(100, seed=i))
            time.sleep(0.02)

    _, used = together(write, read)
    assert used < 0.02 * 20 * 0.02 * 3  # 2% of a core; thrice, since machines are shared
