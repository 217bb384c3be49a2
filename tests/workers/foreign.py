"""Another user of the host against an engine that starts slowly. Run as a script, it is one of the two:

    python foreign.py engine CONTROL_PLANE        prints its planes and tokens, or the error
    python foreign.py intruder                    drops its rights, then takes ports and process ids as lines
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

NOBODY = 65534
# Where a start is slowed down: the function before which a rank sleeps, by control plane.
POINTS = {
    "shm": [("driver.RendezvousStore", 0), ("connections.make_plane", 0), ("connections.make_plane", 1),
            ("memory._create", 0), ("memory._open", 1), ("memory._peers", 0), ("memory._peers", 1),
            ("connections._data_plane", 0), ("connections._data_plane", 1)],
    "gloo": [("connections.make_plane", 0), ("connections.make_plane", 1), ("groups._stdout_to_stderr", 0),
             ("groups._stdout_to_stderr", 1), ("groups._prove", 0), ("groups._prove", 1),
             ("connections._data_plane", 0), ("connections._data_plane", 1)]}
FOLDERS = {"driver": "executors", "connections": "executors", "memory": "links", "groups": "links"}


def listening(pid: int) -> set[str]:
    """Where a process accepts connections: "tcp ADDRESS:PORT" as in /proc, or "unix NAME"."""
    sockets, found = set(), set()
    with contextlib.suppress(OSError):  # it ended
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in sockets:
                    found.add(f"{table} {fields[1]}")
        for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[3], 16) & 1 << 16 and fields[6] in sockets:  # of a socket that accepts
                found.add(f"unix {fields[7:]}")
    return found


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                for child in (task / "children").read_text().split()]
    return []


def attack(plane: str, point: str, rank: int, pause: float) -> tuple[dict[str, Any], dict[str, int]]:
    """What the engine printed, and what the intruder achieved: `ports` found, keys `stored`, `descriptors` seen."""
    import forked  # not where this file is a script

    environment = dict(os.environ, TEST_PAUSE=f"{point} {rank} {pause}")
    script, pipe = [sys.executable, __file__], subprocess.PIPE
    told: set[str] = set()
    quiet = dict(os.environ, TORCH_CPP_LOG_LEVEL="FATAL")
    with subprocess.Popen([*script, "intruder"], stdin=pipe, stdout=pipe, text=True, env=quiet) as intruder:
        assert intruder.stdin is not None and intruder.stdout is not None
        assert intruder.stdout.readline() == "ready\n"
        with forked.Popen([*script, "engine", plane], stdout=pipe, text=True, env=environment) as engine:
            assert engine.stdout is not None
            while engine.poll() is None:
                pids = [engine.pid, *children(engine.pid)]
                found = {f"pid {pid}" for pid in pids}.union(*map(listening, pids))
                for line in found - told:
                    intruder.stdin.write(line + "\n")
                intruder.stdin.flush()
                told |= found
                time.sleep(0.005)
            printed = engine.stdout.read()
        achieved, _ = intruder.communicate(timeout=120)
        return json.loads(printed), json.loads(achieved)


def intrude() -> None:
    import encodings.idna  # noqa: F401  # before the rights are gone: the interpreter may lie in another user's folder

    from torch.distributed import TCPStore

    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    print("ready", flush=True)
    achieved, kept = {"ports": 0, "stored": 0, "descriptors": 0}, []

    def store(port: int) -> None:
        with contextlib.suppress(Exception):
            found = TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=2), wait_for_workers=False)
            for key in ("control/0", "control/1", "data/0", "data/1"):
                found.set(key, "no: said another user")
                achieved["stored"] += 1

    for line in sys.stdin:
        kind, _, where = line.strip().partition(" ")
        if kind == "pid":
            with contextlib.suppress(OSError):
                achieved["descriptors"] += len(os.listdir(f"/proc/{where}/fd"))
        elif kind == "unix":
            achieved["ports"] += 1
        else:
            port = int(where.partition(":")[2], 16)
            for number in range(4):  # gloo's handshake is a number from 0
                with contextlib.suppress(OSError):
                    kept.append(socket.create_connection(("127.0.0.1", port)))
                    kept[-1].sendall(struct.pack("q", number))
            achieved["ports"] += 1
            threading.Thread(target=store, args=(port,), daemon=True).start()
    print(json.dumps(achieved), flush=True)
    os._exit(0)


def slow_down(rank: int) -> None:
    """In each rank: sleep before the function that TEST_PAUSE names, once, if it is this rank's turn."""
    from workers.links import groups

    where, at, seconds = os.environ["TEST_PAUSE"].split()
    groups.CONNECT = timedelta(seconds=float(seconds) + 10)
    module_name, _, name = where.partition(".")
    module = importlib.import_module(f"workers.{FOLDERS[module_name]}.{module_name}")
    plain: Callable[..., Any] = getattr(module, name)

    def paused(*args: Any, **options: Any) -> Any:
        setattr(module, name, plain)
        time.sleep(float(seconds))
        return plain(*args, **options)

    if rank == int(at):
        setattr(module, name, paused)


def engine(plane: str) -> None:
    from worker_cases import Driver, executor

    from hal.errors import HalError

    try:
        made = executor(tp=2, control_plane=plane, worker="foreign_worker:PausingWorker")
        links = type(made._plane).__name__, type(made._worker.communicator).__name__  # type: ignore[attr-defined]
        tokens = Driver(made, [[1, 2, 3], [4] * 9]).run(4)
        made.shutdown()
        print(json.dumps({"links": links, "tokens": tokens}))
    except HalError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))


def expected() -> Iterator[list[int]]:
    from worker_cases import Driver, executor

    made = executor()
    yield from Driver(made, [[1, 2, 3], [4] * 9]).run(4)
    made.shutdown()


if __name__ == "__main__":
    engine(sys.argv[2]) if sys.argv[1] == "engine" else intrude()
