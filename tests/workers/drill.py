"""The failure drill: what fails (an exception, a kill, a stop, no memory), when, on which rank and in which topology.

In each case the driver gets an error that names the rank and the cause within the deadline; then no process and nothing
in shared memory is left, and the next engine starts. Where the driver is killed, its ranks end, though a child that it
forked lives. Where another user of the host attacks an engine that starts slowly (as root: it takes two users), tokens
are right or there is an error.

    python tests/workers/drill.py [--loops N] [--only TEXT] [--pause SECONDS]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign
from worker_cases import MODEL, Driver, executor

from hal.errors import WorkerError

PAUSE = 2.0  # seconds that an attacked engine is slowed down for
ORPHANS = 2.0  # seconds in which ranks end when their driver was killed
HEARTBEAT = 3.0  # less, and a rank that loads torch on a busy machine is taken for a stopped one
GONE = 5.0  # seconds until every process has ended
STEP = 3  # in which it happens
SLACK = 0.0  # seconds more for all of these, where the machine is shared
# Seconds to the error, from the step's submission or, at the start, from where the fault is raised: a stopped rank is
# noticed after a heartbeat, and a start includes loading torch in every process.
IN_STEP, AT_START = {"stop": 1.5 * HEARTBEAT + 1.0}, 20.0
CAUSES = {"bug": "KeyError", "die": "died", "stop": "silent", "oom": "RuntimeError"}


@dataclass(frozen=True)
class Case:
    topology: tuple[int, int]
    phase: str
    kind: str
    rank: int
    plane: str
    wire: str = "model-input"

    def __str__(self) -> str:
        tp, pp = self.topology
        return f"tp{tp}pp{pp}-{self.phase}-{self.kind}-rank{self.rank}-{self.plane}-{self.wire}"


def cases() -> list[Case]:
    found = []
    for topology, ranks in (((2, 1), [1]), ((1, 2), [1]), ((2, 2), [1, 3])):
        for rank in ranks:
            found += [(topology, phase, kind, rank) for phase in ("load", "warmup", "execute")
                      for kind in ("bug", "die", "stop", "oom")]
        found += [(topology, phase, "bug", 0) for phase in ("load", "prepare", "execute")]
        found += [(topology, "execute", "oom", 0)]
        found += [(topology, "shutdown", kind, ranks[-1]) for kind in ("bug", "die", "stop")]
        found += [(topology, "parent", kind, 0) for kind in ("die", "interrupt")]
    planes = "shm", "gloo"
    made = [Case(*case, planes[i % 2]) for i, case in enumerate(found)]
    made += [Case((2, pp), "connect", kind, 1, "gloo") for pp in (1, 2) for kind in ("bug", "die", "stop", "oom")]
    made += [Case((2, 1), "parent", "fork", 0, plane) for plane in ("shm", "gloo", "collectives")]
    if os.geteuid() == 0:
        made += [Case((2, 1), "foreign", point, rank, plane) for plane, points in foreign.POINTS.items()
                 for point, rank in points]
    return made + [Case((2, 1), "prepare", kind, 1, plane, "request")
                   for kind, plane in (("bug", "shm"), ("die", "gloo"), ("stop", "shm"))]


def run(case: Case, pause: float = PAUSE) -> float:
    """Seconds to the error, or to the end of the attack. Raises AssertionError: the case went wrong."""
    import forked  # its folder is in the path by now

    os.environ["TEST_FAULT"] = f"{case.phase}-{case.kind} {case.rank} " + (
        str(STEP) if case.phase in ("prepare", "execute") else "0")
    before = shared_memory(), descendants(os.getpid())
    if case.phase == "foreign":
        took = attacked(case, pause)
    else:
        took = parent(case) if case.phase == "parent" else driver(case)
    end = time.monotonic() + GONE + SLACK
    while (left := descendants(os.getpid()) - before[1] - {int(forked.stays() or 0)}) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left, f"processes left: {left}"
    assert not (kept := left_in_shared_memory(before[0])), f"left in shared memory: {kept}"
    return took


def driver(case: Case) -> float:
    tp, pp = case.topology
    start = time.monotonic()
    made = None
    try:
        made = executor(device="worker_cases:faulty", worker="worker_cases:FaultyWorker", tp=tp, pp=pp,
                        wire=case.wire, control_plane=case.plane,
                        heartbeat=HEARTBEAT + SLACK / 5 if case.kind == "stop" else 30.0)
        steps = Driver(made, [[1, 2, 3], [4] * 9])
        for _ in range(STEP + 2):
            start = time.monotonic()
            steps.run(1)
    except Exception as error:
        took = time.monotonic() - start
        assert isinstance(error, WorkerError), repr(error)
        assert (error.rank, error.cause) == (case.rank, CAUSES[case.kind]), repr(error)
        assert (f"step {STEP}" in str(error)) == (made is not None and case.kind in ("bug", "oom")), str(error)
        limit = SLACK + (AT_START if made is None else IN_STEP.get(case.kind, 1.0))
        assert took <= limit, f"{took:.1f} s, more than {limit} s: {error}"
        return took
    assert case.phase == "shutdown", "no error"
    start = time.monotonic()
    made.shutdown()
    took = time.monotonic() - start
    assert took <= GONE + SLACK, f"the end took {took:.1f} s"
    return took


def attacked(case: Case, pause: float) -> float:
    start = time.monotonic()
    printed, achieved = foreign.attack(case.plane, case.kind, case.rank, pause)
    assert achieved["stored"] == achieved["descriptors"] == 0, achieved
    if case.plane == "shm":
        assert achieved["ports"] == 0, achieved
        assert printed.get("links") == ["ShmPlane", "ShmCommunicator"], printed
    else:
        assert "error" in printed or printed["links"] == ["GlooPlane", "TorchCommunicator"], printed
    assert "error" in printed or printed["tokens"] == list(foreign.expected()), printed
    return time.monotonic() - start


def parent(case: Case) -> float:
    """The driver is a process of its own, which is killed or interrupted in the middle of its steps. kind "fork": it is
    killed, and a child that it forked lives."""
    import forked

    tp, pp = case.topology
    script = f"drive({{'tp': {tp}, 'pp': {pp}, 'control_plane': {case.plane!r}}}, {case.kind == 'fork'})"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
               f"from drill import drive\n{script}"]
    with forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        pids = {int(pid) for pid in process.stdout.readline().split()}
        child = int(process.stdout.readline()) if case.kind == "fork" else 0
        assert len(pids) == tp * pp - 1, "the driver did not start"
        start = time.monotonic()
        process.send_signal(signal.SIGINT if case.kind == "interrupt" else signal.SIGKILL)
        status = process.wait(GONE + SLACK)
        assert status == -(signal.SIGINT if case.kind == "interrupt" else signal.SIGKILL), status
        try:
            while any(map(lives, pids)):
                assert time.monotonic() < start + SLACK + (ORPHANS if child else GONE), "ranks outlive their driver"
                time.sleep(0.01)
            return time.monotonic() - start
        finally:
            if child:
                os.kill(child, signal.SIGKILL)


def drive(options: dict[str, Any], fork: bool) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    made = executor(dataclasses.replace(MODEL, max_position=1 << 14), **options)
    print(*(p.process.pid for p in made._ranks.processes), flush=True)
    if fork:
        if (child := os.fork()) == 0:
            threading.Event().wait()
        print(child, flush=True)
    driver = Driver(made, [[1, 2, 3]])
    while True:
        driver.run(1)


def shared_memory() -> set[str]:
    """The names in /dev/shm, but Python's semaphores: other processes of this machine make and remove them at any time,
    and nothing of this library does."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def left_in_shared_memory(before: set[str]) -> set[str]:
    """The names that are new and stay: other processes of this machine have some for a moment."""
    end = time.monotonic() + GONE
    while (left := shared_memory() - before) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def lives(pid: int) -> bool:
    """Not of an orphan that has ended and that the system has yet to take notice of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """Ids of this process's children, those that ended and were not waited for among them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.add(int(path.parent.name))
        except OSError:
            pass  # it ended
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds that an attacked engine is slowed down for")
    args = parser.parse_args()
    chosen = [case for case in cases() if args.only in str(case)]
    failed, slowest = 0, 0.0
    begin = time.monotonic()
    for loop in range(args.loops):
        for case in chosen:
            try:
                took = run(case, args.pause)
                slowest = max(slowest, took if case.phase in ("prepare", "execute") else 0.0)
                print(f"{case}: {took:.2f} s", flush=True)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"{case}: FAILED in loop {loop}: {error}", flush=True)
    print(f"{len(chosen)} cases x {args.loops}: {failed} failed; {time.monotonic() - begin:.0f} s; "
          f"slowest error in a step {slowest:.2f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
