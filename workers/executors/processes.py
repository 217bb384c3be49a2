"""The worker processes of one engine: the driver starts them, listens to them and ends them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hal.config import WorkerConfig
from hal.cpus import usable_cpus
from workers.links.rendezvous import Rendezvous
from workers.links.reports import Failure, FailureListeners

LOOPBACK = "127.0.0.1"
_SCRIPT = Path(__file__).with_name("rank_process.py")
_EXIT = 5.0  # seconds that a process may take to end on a busy machine, once its reports are closed
_GRACE = 0.5  # a rank's own report may come so many seconds after the report of a rank that lost it
_BEATS = 4  # signs of life within EngineConfig.heartbeat
PATIENCE = 3.0  # seconds that a process is given to end by itself
_ROOM = 1 << 20  # bytes of a pipe to a rank, so that a stopped rank does not block the driver


class RankProcess:
    """One worker process. `send` writes a JSON line to it; its reports are read from `reports`."""

    def __init__(self, config: WorkerConfig, worker: str, host: str, environment: dict[str, str]) -> None:
        self.rank, self.heartbeat = config.topology.rank, config.engine.heartbeat
        self.reports, theirs = os.pipe()
        try:
            # The script's path and not -m, since the working directory may have a folder named workers. What the
            # process prints goes to the standard error, since the standard output may be a program's result.
            self.process = subprocess.Popen([sys.executable, str(_SCRIPT), str(os.getpid())], stdin=subprocess.PIPE,
                                            stdout=2, pass_fds=[theirs], env=environment)
        finally:
            os.close(theirs)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # the system allows no larger pipe
            fcntl.fcntl(self.process.stdin, fcntl.F_SETPIPE_SZ, _ROOM)
        path = [os.path.abspath(p) for p in sys.path if isinstance(p, str)]
        self.send(config=config.to_json(), worker=worker, host=host, path=path, reports=theirs,
                  beat=config.engine.heartbeat / _BEATS)
        self.buffer = b""
        self.missed = 0  # the number of missing signs of life, one after another

    def send(self, **content: Any) -> None:
        assert self.process.stdin is not None
        # It may have ended, and its reports say why; or another thread has closed the pipe.
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """Reports that have arrived, or None when there will be no more."""
        data = os.read(self.reports, 1 << 16)
        self.missed = 0
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines if line] if data else None

    def status(self) -> int | str | None:
        """The exit status of a process that has closed its reports, or None if it does not end."""
        try:
            return self.process.wait(_EXIT)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self.process.kill()

    def hang_up(self) -> None:
        """Tell the process that the driver has no more messages, which ends it."""
        assert self.process.stdin is not None
        self.send(end=True)  # a forked child of this process may keep the pipe open
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Wait until it has ended, and kill it after `seconds`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Ranks:
    """All ranks but the driver. A thread listens to them. When a rank fails, the thread ends all others. This closes
    their connections, so a driver that waits in a collective gets an error. Then it tells the `listeners`.

    Attributes:
        ending: the ranks are told to end, so that their end is no failure. Set it before they are told.
    """

    def __init__(self, listeners: FailureListeners) -> None:
        self.listeners = listeners
        self.processes: list[RankProcess] = []
        self._changed = threading.Condition()
        self._reported: dict[str, dict[int, dict[str, Any]]] = {}
        self._failure: Failure | None = None
        self.ending = False
        self._listener: threading.Thread | None = None

    def host(self) -> str:
        """The address at which the ranks reach this host."""
        return LOOPBACK

    def start(self, configs: Sequence[WorkerConfig], worker: str) -> Rendezvous:
        """Start the ranks. Returns the rendezvous where they meet."""
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(len(configs) + 1)))
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        host = self.host()
        self.launch(configs, worker, host, environment)
        self._rendezvous = Rendezvous(host, lambda key, value: self.tell(key=key, value=value))
        self._listener = threading.Thread(target=self._listen, name="hal-ranks", daemon=True)
        self._listener.start()
        return self._rendezvous

    def launch(self, configs: Sequence[WorkerConfig], worker: str, host: str, environment: dict[str, str]) -> None:
        for config in configs:
            self.processes.append(RankProcess(config, worker, host, environment))

    def expect(self, event: str) -> list[dict[str, Any]] | Failure:
        """Wait until every rank has reported `event`. Returns the reports, or the first failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._reported.get(event, {})) == len(self.processes))
            return self._failure or list(self._reported.get(event, {}).values())

    def tell(self, **content: Any) -> None:
        for process in self.processes:
            process.send(**content)

    def failure(self, timeout: float = 0.0) -> Failure | None:
        """The first failure, waiting up to `timeout` seconds for one."""
        if timeout and self.processes:
            with self._changed:
                self._changed.wait_for(lambda: self._failure, timeout)
        return self._failure

    def end(self, patience: float = PATIENCE) -> None:
        """End all processes. A process that has not ended by itself within `patience` seconds is killed. Idempotent."""
        self.ending = True
        deadline = time.monotonic() + patience
        for process in self.processes:
            if patience == 0:
                process.kill()
            process.hang_up()
        for process in self.processes:
            process.wait(max(deadline - time.monotonic(), 0))
        if self._listener is not None and self._listener is not threading.current_thread():
            self._listener.join()
            for process in self.processes:
                os.close(process.reports)
            self._listener, self.processes = None, []

    def _listen(self) -> None:
        failures: list[Failure] = []
        since = 0.0
        tick = self.processes[0].heartbeat / _BEATS
        due = time.monotonic() + tick
        with selectors.DefaultSelector() as selector:
            for process in self.processes:
                selector.register(process.reports, selectors.EVENT_READ, process)
            while selector.get_map():
                events = selector.select(_GRACE if failures and self._failure is None else tick)
                for key, _ in events:
                    reports = key.data.read()
                    if reports is None:
                        selector.unregister(key.fileobj)
                        if not self.ending and all(f.rank != key.data.rank for f in failures):
                            failures.append(Failure.death(key.data.rank, key.data.status()))
                    for report in reports or ():
                        event = report.pop("event")
                        if event == "failed":
                            since = since or time.monotonic()
                            failures.append(Failure(**report))
                        elif event == "entry":
                            self._rendezvous.arrived(**report)
                            for other in self.processes:
                                if other is not key.data:
                                    other.send(**report)
                        else:
                            self._reported.setdefault(event, {})[key.data.rank] = report
                if time.monotonic() >= due:  # ticks, not seconds: this process may have been stopped too
                    due = time.monotonic() + tick
                    for key in selector.get_map().values():
                        key.data.missed += 1
                        if key.data.missed > _BEATS and not self.ending and not failures:
                            failures.append(Failure.silence(key.data.rank, key.data.heartbeat))
                found = None
                with self._changed:
                    if failures and self._failure is None:
                        # The cause: a rank's own error comes before a death, and both before an error of a lost
                        # connection.
                        first = min(failures, key=lambda f: (f.lost, f.cause == "died"))
                        if not first.lost or time.monotonic() >= since + _GRACE:
                            self._failure = found = first
                            for process in self.processes:
                                process.kill()
                    self._changed.notify_all()
                if found is not None:
                    self.listeners.tell(found.in_step())


def threads_per_rank(world_size: int) -> int:
    """The processors that this process may use, shared by the ranks."""
    return max(usable_cpus() // world_size, 1)


def threads_of_driver(world_size: int) -> int:
    """The number of threads of the driver's rank. If it is the only rank, it is torch's own number in a new process."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    if world_size > 1:
        return threads_per_rank(world_size)
    # torch starts one thread a core, and not one for each of the core's hardware threads.
    return min(len({_siblings(cpu) for cpu in os.sched_getaffinity(0)}), usable_cpus())


def _siblings(cpu: int) -> str:
    """The hardware threads of this one's core; itself alone where the system does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
