"""Who may take part in an engine: nothing listens where a rank can be told by its pipe, and what listens asks for a
secret; memory is mapped if it is the driver's; and no answer of another process changes the control plane."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch.distributed
import worker_cases
from drill import lives
from foreign import listening
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import on_ranks
from soon import soon
from worker_cases import Driver, executor

from hal.config import Topology
from hal.contracts.device import GLOO
from hal.errors import BackendError, HalError, WireError, WorkerError
from hal.testing.null import backend as null
from workers.control.collectives import CPU
from workers.control.planes import make_plane
from workers.links import groups, rendezvous
from workers.links import memory as shm
from workers.links.groups import RendezvousStore, make_group
from workers.links.liveness import PeerWatch
from workers.links.memory import Segment
from workers.links.rendezvous import Rendezvous

FORKING = Path(__file__).with_name("forking.py")
SIZE = 1 << 16
MAPPED = SIZE + shm._FIRST


def met(world: int) -> list[RendezvousStore]:
    """The ranks' stores, as the driver passes entries on."""
    made: list[Rendezvous] = []

    def tell(rank: int) -> Callable[[str, str], None]:
        def pass_on(key: str, value: str) -> None:
            for other in made[:rank] + made[rank + 1:]:
                other.arrived(key, value)

        return pass_on

    made += [Rendezvous("127.0.0.1", tell(rank)) for rank in range(world)]
    return [RendezvousStore(each) for each in made]


@pytest.mark.slow
def test_nothing_listens_where_ranks_share_memory() -> None:
    before = listening(os.getpid())
    made = executor(tp=2, pp=2)
    pids = [process.process.pid for process in made._ranks.processes]
    Driver(made, [[1, 2, 3]]).run(2)
    assert listening(os.getpid()) <= before and not any(map(listening, pids))
    made.shutdown()


def test_groups_meet_through_the_pipes() -> None:
    """Gloo asks our store, which is Python, from its constructor."""
    stores = met(3)
    made = on_ranks(3, lambda rank, _: make_group(GLOO, stores[rank], "x", rank, 3))
    sums = [torch.ones(2) * rank for rank in range(3)]
    on_ranks(3, lambda rank, _: made[rank].allreduce([sums[rank]]).wait())
    assert [s.tolist() for s in sums] == [[3.0, 3.0]] * 3


def test_an_entry_that_does_not_come_is_a_named_error() -> None:
    store = met(1)[0]
    with pytest.raises(WorkerError, match=r"'b' did not come within 0\.1 s") as error:
        store._rendezvous.get("b", 0.1)
    assert error.value.rank == -1 and not store.check(["b"])
    store.set("b", "text")
    assert store.get("b") == b"text" and store.check(["b"])


@pytest.mark.slow
def test_an_entry_may_come_while_the_ranks_are_ended() -> None:
    """The thread that passes it on must live, since it alone sees how the ranks end."""
    made = executor(tp=2)
    rank = made._ranks.processes[0]
    rank.hang_up()
    rank.send(key="late", value="")
    made.shutdown()


@contextlib.contextmanager
def memory(kind: str) -> Iterator[str]:
    """What an attacker may name as the driver's memory, as the driver would say it."""
    secret, fds = b"s" * 16, []
    if kind == "pipe":
        fds += os.pipe()
    elif kind == "socket":
        fds += [end.detach() for end in socket.socketpair()]
    elif kind == "file":
        fds.append(os.open("/var/tmp", os.O_TMPFILE | os.O_RDWR, 0o600))
    else:
        fds.append(os.memfd_create("hal-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    if kind not in ("pipe", "socket"):
        os.ftruncate(fds[0], MAPPED // 2 if kind == "size" else MAPPED)
        os.pwrite(fds[0], b"another one's..." if kind == "secret" else secret, 0)
    if kind in ("size", "secret", "owner", "right"):
        shm.fcntl.fcntl(fds[0], shm.fcntl.F_ADD_SEALS, shm._SEALS)
    if kind == "owner":
        os.fchown(fds[0], 65534, 65534)
    try:
        yield f"{os.getpid()} {fds[0]} {secret.hex()} {shm._host()}"
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(("kind", "text"), [
    ("pipe", "not a regular file"), ("socket", "not there"), ("file", "not a sealed memfd"),
    ("unsealed", "not a sealed memfd"), ("size", "bytes, not"), ("secret", "another secret"),
    ("owner", "a file of user 65534, not of user 0"), ("right", "")])
def test_memory_is_mapped_only_if_it_is_the_drivers(kind: str, text: str) -> None:
    if kind == "owner" and os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    with memory(kind) as where:
        if kind == "right":
            os.close(shm._open(where, MAPPED)[0])
        else:
            with pytest.raises(WireError) as error:
                shm._open(where, MAPPED)
            assert text in str(error.value)


FORGED = ("", "no", "no: said the attacker", "1 ../../../tmp/evil " + "0" * 32 + " x", "../1 3 " + "0" * 32, "1 3",
          "9999999999 3 " + "0" * 32, "refused", "-1 3 " + "0" * 32, "١ 3 " + "0" * 32)


@pytest.mark.parametrize("answer", FORGED)
@pytest.mark.parametrize("plane", ["auto", "shm"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_forged_answer_is_an_error_and_never_another_plane(answer: str, plane: str, victim: int) -> None:
    """On every rank, whichever rank it is put in the place of."""
    class Forged:
        def __init__(self, store: Any) -> None:
            self.store = store

        def set(self, key: str, value: str) -> None:
            self.store.set(key, answer if key == f"control/{victim}" else value)

        def get(self, key: str) -> bytes:
            return bytes(self.store.get(key))

    def make(rank: int, store: Any) -> None:
        with pytest.raises(WireError):
            make_plane(plane, Topology(tp=2, rank=rank), Forged(store), null, CPU)

    on_ranks(2, make)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode(errors="replace")),
                 st.lists(st.sampled_from(["1", "3", "/", "..", "0" * 32, " ", "refused: ", "pid:[1]", "\0", "\n"]),
                          max_size=8).map("".join)))
def test_no_text_is_mapped_or_raises_anything_else(text: str) -> None:
    with pytest.raises((WireError, OSError)):
        shm._open(text, MAPPED)
    with pytest.raises((WireError, BackendError)):
        shm._peers([text, "7"], 1, "7")


def test_a_rank_that_may_not_open_the_memory_says_so_and_all_use_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    def segment(rank: int, store: Any) -> None:
        with pytest.raises(BackendError, match="cannot share memory") as error:
            Segment("test", rank, 2, store, SIZE)
        assert "rank 1: [Errno 13]" in str(error.value.got)

    opened = shm.os.open
    monkeypatch.setattr(shm.os, "open", lambda path, *args: forbidden() if "/fd/" in str(path) else opened(path, *args))
    on_ranks(2, segment)


def intrude(stop: threading.Event, first: bytes) -> Iterator[None]:
    """Connect to all that begins to listen in this process, and say `first`: gloo's handshake is a number from 0."""
    known, kept = listening(os.getpid()), []
    while not stop.is_set():
        for where in listening(os.getpid()) - known:
            known.add(where)
            port = int(where.rpartition(":")[2], 16)
            for number in range(4):
                with contextlib.suppress(OSError):
                    kept.append(socket.create_connection(("127.0.0.1", port)))
                    kept[-1].sendall(first or struct.pack("q", number))
        time.sleep(0.005)
    for connection in kept:
        connection.close()
    yield


@contextlib.contextmanager
def intruder(first: bytes = b"") -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=lambda: list(intrude(stop, first)))
    thread.start()
    time.sleep(0.1)
    yield
    stop.set()
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("paused", [0, 1])
def test_a_process_that_takes_a_ranks_place_in_gloo_is_refused(monkeypatch: pytest.MonkeyPatch, paused: int) -> None:
    """A rank is slow between listening and connecting, and another program is first at its port."""
    monkeypatch.setattr(groups, "CONNECT", groups.timedelta(seconds=3))
    monkeypatch.setattr(rendezvous, "CONNECT", 3.0)
    stores, plain = met(2), groups._stdout_to_stderr
    slow = threading.local()

    def pausing() -> Any:
        time.sleep(1.0 if slow.rank == paused else 0.0)
        return plain()

    def join(rank: int, _: Any) -> str:
        slow.rank = rank
        try:
            group = make_group(GLOO, stores[rank], "x", rank, 2)
        except HalError as error:
            return type(error).__name__
        x = torch.ones(1)
        group.allreduce([x]).wait()
        return f"sum {x.item()}"

    monkeypatch.setattr(groups, "_stdout_to_stderr", pausing)
    with intruder():
        results = on_ranks(2, join)
    assert results == ["sum 2.0"] * 2 or not any(result.startswith("sum") for result in results), results


def test_the_standard_output_is_put_back_when_several_threads_make_groups() -> None:
    """They begin and end in any order."""
    before = os.fstat(1)
    for order in ((0, 1), (1, 0)):
        made = [groups._stdout_to_stderr() for _ in order]
        for each in made:
            each.__enter__()
        made[order[0]].__exit__(None, None, None)
        assert os.path.samestat(os.fstat(1), os.fstat(2))
        made[order[1]].__exit__(None, None, None)
        assert os.path.samestat(os.fstat(1), before)


def test_another_secret_than_the_ranks_is_refused() -> None:
    stores = met(2)
    passed_on = stores[1].set
    stores[1].set = lambda key, value: passed_on(key, b"?" * 16 if "secret" in key else value)  # type: ignore[method-assign]

    def join(rank: int, _: Any) -> str:
        try:
            make_group(GLOO, stores[rank], "x", rank, 2)
        except HalError as error:
            return str(error)
        return ""

    assert "a process that is not rank 1 answered in its place" in on_ranks(2, join)[0]


@pytest.mark.slow
@pytest.mark.parametrize("first", [b"x", b"." * 16, b"?" * 5000])
def test_only_ranks_can_join(first: bytes) -> None:
    """Though others connect first, silent or not."""
    with intruder(first):
        def join(rank: int, store: Any) -> PeerWatch:
            time.sleep(0.3 * rank)
            return PeerWatch(Topology(tp=3, rank=rank), store, "this test")

        made = on_ranks(3, join)
    assert len(made[0]._sockets) == 2 and not any(line.lost for line in made)
    for line in reversed(made):
        line.guard([], GLOO)
        line.close()


@pytest.mark.slow
@pytest.mark.parametrize("plane", ["shm", "gloo", "collectives"])
def test_ranks_end_with_a_killed_driver_though_its_forked_child_lives(plane: str) -> None:
    """The child has the driver's pipes and sockets, so none of them closes."""
    with forked.Popen([sys.executable, str(FORKING), plane, "2", "stay"], stdin=subprocess.PIPE,
                      stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "stay\n"
        child, *ranks = map(int, driver.stdout.readline().split())
        driver.kill()
        try:
            assert soon(lambda: not any(map(lives, ranks))), "ranks outlive their driver"
            assert lives(child)
        finally:
            os.kill(child, 9)


@pytest.mark.slow
def test_an_engine_outlives_the_thread_that_made_it() -> None:
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(executor(tp=2)))
    thread.start()
    thread.join()
    time.sleep(1.5)  # longer than ranks take to look for their parent
    assert len(Driver(made[0], [[1, 2, 3]]).run(2)[0]) == worker_cases.SIZE + 1
    made[0].shutdown()
